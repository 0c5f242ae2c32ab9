//! The command line of a mapper, reducer or combiner: cut into words as a shell would, but run without one.

use std::path::{Path, PathBuf};

use cairn_proto::{Error, ErrorCode, Result};

/// A command and its arguments.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CommandLine {
    words: Vec<String>,
}

fn invalid(text: String) -> Error {
    Error::new(ErrorCode::InvalidArgument, text)
}

impl CommandLine {
    /// Cuts `text` at blanks; quotes and backslashes work as in a shell. `role` is for messages: "mapper".
    pub fn parse(role: &str, text: &str) -> Result<Self> {
        let words = split(text).ok_or_else(|| invalid(format!("{role} {text:?}: a quote is not closed")))?;
        if words.is_empty() {
            return Err(invalid(format!("the {role} is empty")));
        }
        let only_for_shells =
            |word: &&(String, bool)| !word.1 && matches!(&*word.0, "|" | "||" | "&&" | "&" | ";" | ">" | ">>" | "<");
        if let Some((word, _)) = words.iter().find(only_for_shells) {
            let text = format!(
                "{role} {text:?}: no shell runs it, so {word:?} would be an argument; write sh -c '...' if a shell is meant"
            );
            return Err(invalid(text));
        }
        Ok(Self { words: words.into_iter().map(|(word, _)| word).collect() })
    }

    /// As it was given.
    pub fn arguments(&self) -> &[String] {
        self.words.get(1..).unwrap_or_default()
    }

    /// The file to run: a name without a slash is looked for in the task's folder `dir`, then in the folders of `path`. Files of `dir` that `plain` names
    /// (between blanks) are not executable, whatever their modes are.
    pub fn program(&self, role: &str, dir: &Path, path: &str, plain: &str) -> Result<PathBuf> {
        let is_plain = |candidate: &Path| {
            // Written with or without "./".
            let here = candidate.components().eq(dir.join(candidate.file_name().unwrap_or_default()).components());
            here && plain.split(' ').any(|name| candidate.file_name().is_some_and(|file| file == name))
        };
        let name = self.words.first().map_or("", String::as_str);
        let candidates: Vec<PathBuf> = if name.contains('/') {
            vec![dir.join(name)]
        } else {
            std::iter::once(dir).chain(path.split(':').map(Path::new)).map(|folder| folder.join(name)).collect()
        };
        let mut refused = None;
        for candidate in candidates.into_iter().filter(|candidate| candidate.is_file()) {
            if !is_plain(&candidate) && rustix::fs::access(&candidate, rustix::fs::Access::EXEC_OK).is_ok() {
                return Ok(candidate);
            }
            refused.get_or_insert(candidate);
        }
        // What was shipped is the same everywhere; what is on the node may be otherwise on another.
        let (code, text) = match refused {
            Some(candidate) => {
                let code =
                    if candidate.starts_with(dir) { ErrorCode::InvalidArgument } else { ErrorCode::FileNotFound };
                let text = format!(
                    "{role} {name}: not executable; make it so (chmod +x) before it is shipped, or name its interpreter (python3 {name})"
                );
                (code, text)
            }
            None => {
                let shipped = name.contains('/') && !name.starts_with('/');
                let code = if shipped { ErrorCode::InvalidArgument } else { ErrorCode::FileNotFound };
                let text = format!(
                    "{role} {name}: there is no such file in the task's folder or in the PATH of this node; ship it with --file"
                );
                (code, text)
            }
        };
        Err(Error::new(code, text).with_subject(name))
    }
}

/// Words, and whether any part of each was quoted.
fn split(text: &str) -> Option<Vec<(String, bool)>> {
    let mut words: Vec<(String, bool)> = Vec::new();
    let mut word: Option<(String, bool)> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some('"'), '\\') => {
                let next = chars.next()?;
                let word = &mut word.get_or_insert_default().0;
                if !matches!(next, '"' | '\\' | '$' | '`') {
                    word.push('\\');
                }
                word.push(next);
            }
            (Some(_), c) => word.get_or_insert_default().0.push(c),
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default().1 = true;
            }
            (None, '\\') => {
                let next = chars.next()?;
                let word = word.get_or_insert_default();
                (word.1, _) = (true, word.0.push(next));
            }
            (None, c) if c.is_ascii_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().0.push(c),
        }
    }
    words.extend(word);
    quote.is_none().then_some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        CommandLine::parse("mapper", text).unwrap().words
    }

    #[test]
    fn words_are_those_of_a_shell() {
        assert_eq!(words(" python3  m.py -x "), ["python3", "m.py", "-x"]);
        assert_eq!(words(r#"awk '{print $1 "\t" 1}' a\ b"#), ["awk", r#"{print $1 "\t" 1}"#, "a b"]);
        assert_eq!(words(r#"sed "s/\"/'/" "" x"y"z"#), ["sed", "s/\"/'/", "", "xyz"]);
        assert_eq!(words(r#"sh -c 'a | b > c' "\n""#), ["sh", "-c", "a | b > c", r"\n"]);
    }

    #[test]
    fn what_only_a_shell_understands_is_refused() {
        for text in ["", "  ", "cat 'x", "cat \\", "cut -f1 | sort", "cat > x", "a && b"] {
            assert!(CommandLine::parse("mapper", text).is_err(), "{text}");
        }
        let error = CommandLine::parse("mapper", "cut -f1 | sort").unwrap_err();
        assert!(error.message().contains("sh -c"), "{error}");
        assert_eq!(words("grep '|'"), ["grep", "|"]);
    }

    #[test]
    fn programs_are_looked_for_in_the_folder_first() {
        let dir = tempfile::tempdir().unwrap();
        let find = |text: &str, path: &str| {
            CommandLine::parse("mapper", text).unwrap().program("mapper", dir.path(), path, "data.py")
        };
        assert!(find("sh", "/nowhere:/bin").unwrap().ends_with("bin/sh"));
        let error = find("m.py", "/bin").unwrap_err();
        assert!(error.message().contains("no such file") && error.message().contains("--file"), "{error}");
        assert_eq!(error.code(), ErrorCode::FileNotFound, "another node may have it");
        assert_eq!(find("./m.py", "/bin").unwrap_err().code(), ErrorCode::InvalidArgument, "it was to be shipped");
        cairn_common::durable::write_atomic(&cairn_common::durable::SystemFs, &dir.path().join("m.py"), b"x").unwrap();
        let error = find("m.py", "/bin").unwrap_err();
        assert!(error.message().contains("not executable") && error.message().contains("chmod"), "{error}");
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
        rustix::fs::chmod(dir.path().join("m.py"), rustix::fs::Mode::RWXU).unwrap();
        assert_eq!(find("m.py", "/bin").unwrap(), dir.path().join("m.py"));
        assert_eq!(find("./m.py -x", "/bin").unwrap(), dir.path().join("./m.py"));
        std::os::unix::fs::symlink(dir.path().join("m.py"), dir.path().join("data.py")).unwrap();
        assert!(find("./data.py", "/bin").unwrap_err().message().contains("not executable"));
    }
}
