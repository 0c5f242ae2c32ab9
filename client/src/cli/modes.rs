//! Permission bits as `chmod` takes them and `ls` shows them.

/// Read, write and execute of user, group and others, and the sticky bit.
const MASK: u32 = 0o1777;

/// What `chmod` is asked to do to each file's bits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ModeChange {
    /// These bits and no others.
    Octal(u32),
    /// Clauses one after the other, as in `u+rw,go-w`.
    Symbolic(Vec<Clause>),
}

/// One of the comma-separated parts of a symbolic mode.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Clause {
    /// Bits of the classes that it speaks of (`u`: 0o700, ...).
    who: u32,
    operator: char,
    /// In each class (0..=7); `X` apart.
    bits: u32,
    /// `X`: execute only for directories and for what somebody can execute already.
    execute_if_any: bool,
    sticky: bool,
}

/// Reads "755", "1777", "u+x", "go-w,a+r", "+t".
pub fn parse(text: &str) -> Result<ModeChange, String> {
    let wrong = || format!("{text:?} is no mode: write it like 644, u+x or go-w");
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return match u32::from_str_radix(text, 8) {
            Ok(bits) if bits <= MASK => Ok(ModeChange::Octal(bits)),
            _ => Err(wrong()),
        };
    }
    let clauses = text.split(',').map(clause).collect::<Option<Vec<_>>>().ok_or_else(wrong)?;
    Ok(ModeChange::Symbolic(clauses.into_iter().flatten().collect()))
}

/// One part; it may hold several operators (`u+r-w`).
fn clause(text: &str) -> Option<Vec<Clause>> {
    let at = text.find(['+', '-', '='])?;
    let mut who = 0;
    for class in text[..at].chars() {
        who |= match class {
            'u' => 0o700,
            'g' => 0o070,
            'o' => 0o007,
            'a' => 0o777,
            _ => return None,
        };
    }
    if who == 0 {
        who = 0o777;
    }
    let mut clauses: Vec<Clause> = Vec::new();
    for letter in text[at..].chars() {
        if matches!(letter, '+' | '-' | '=') {
            clauses.push(Clause { who, operator: letter, bits: 0, execute_if_any: false, sticky: false });
            continue;
        }
        let last = clauses.last_mut()?;
        match letter {
            'r' => last.bits |= 4,
            'w' => last.bits |= 2,
            'x' => last.bits |= 1,
            'X' => last.execute_if_any = true,
            't' => last.sticky = true,
            _ => return None,
        }
    }
    Some(clauses)
}

impl ModeChange {
    /// The bits of a file or directory that has `mode` now.
    pub fn apply(&self, mode: u32, is_directory: bool) -> u32 {
        let clauses = match self {
            Self::Octal(bits) => return *bits,
            Self::Symbolic(clauses) => clauses,
        };
        clauses.iter().fold(mode & MASK, |mode, clause| {
            let execute = clause.execute_if_any && (is_directory || mode & 0o111 != 0);
            let class_bits = clause.bits | u32::from(execute);
            let mut bits = (class_bits * 0o111) & clause.who;
            if clause.sticky {
                bits |= 0o1000;
            }
            match clause.operator {
                '+' => mode | bits,
                '-' => mode & !bits,
                _ => (mode & !clause.who) | bits,
            }
        })
    }
}

/// "rwxr-xr-x"; the sticky bit shows as `t` or `T` in the last place.
pub fn show(mode: u32) -> String {
    let mut out: String =
        (0..9).rev().map(|bit| if (mode >> bit) & 1 == 1 { ['x', 'w', 'r'][bit as usize % 3] } else { '-' }).collect();
    if mode & 0o1000 != 0 {
        out.pop();
        out.push(if mode & 1 == 1 { 't' } else { 'T' });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(text: &str, mode: u32, is_directory: bool) -> u32 {
        parse(text).unwrap().apply(mode, is_directory)
    }

    #[test]
    fn octal_and_symbolic() {
        assert_eq!(applied("755", 0o600, false), 0o755);
        assert_eq!(applied("1777", 0o600, true), 0o1777);
        assert_eq!(applied("u+x", 0o644, false), 0o744);
        assert_eq!(applied("go-w,a+r", 0o622, false), 0o644);
        assert_eq!(applied("o=", 0o647, false), 0o640);
        assert_eq!(applied("+x", 0o640, false), 0o751);
        assert_eq!(applied("u=rw,g+w-r", 0o755, false), 0o635);
        assert_eq!(applied("+t", 0o777, true), 0o1777);
        assert_eq!(applied("-t", 0o1777, true), 0o777);
    }

    #[test]
    fn capital_x_is_for_directories_and_programs() {
        assert_eq!(applied("a+X", 0o644, false), 0o644);
        assert_eq!(applied("a+X", 0o744, false), 0o755);
        assert_eq!(applied("a+X", 0o644, true), 0o755);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for text in ["", "9", "2000", "77777", "u", "u+q", "z+x", "rw", "u+x,"] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn shown_as_ls_does() {
        assert_eq!(show(0o644), "rw-r--r--");
        assert_eq!(show(0o755), "rwxr-xr-x");
        assert_eq!(show(0o1777), "rwxrwxrwt");
        assert_eq!(show(0o1770), "rwxrwx--T");
        assert_eq!(show(0), "---------");
    }
}
