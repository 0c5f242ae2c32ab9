//! Path rules: HDFS's, with limits.
//!
//! A path is absolute, UTF-8, at most 8,000 bytes; a component is 1 to 255 bytes, is not `.` or `..`, and holds no `/`,
//! `:` or NUL. `/.reserved`, `/.cairn` and a component `.snapshot` belong to the system; what lies in `/.cairn/jobs` and `/.cairn/history`
//! belongs to the users whose jobs it describes.

use crate::error::{Error, ErrorCode, Result};

/// Longest path, bytes.
pub const MAX_PATH_BYTES: usize = 8_000;
/// Longest component, bytes.
pub const MAX_NAME_BYTES: usize = 255;

fn invalid(path: &str, why: impl std::fmt::Display) -> Error {
    let shown: String = path.chars().take(120).collect();
    Error::new(ErrorCode::InvalidPath, format!("invalid path {shown:?}: {why}")).with_subject(shown)
}

/// Checks one component.
pub fn check_name(name: &str) -> std::result::Result<(), String> {
    if name.is_empty() {
        return Err("it has an empty component".into());
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(format!("a component of {} bytes is longer than {MAX_NAME_BYTES}", name.len()));
    }
    if name == "." || name == ".." {
        return Err(format!("the component {name:?} is not allowed"));
    }
    if name.contains(':') {
        return Err(format!("the component {name:?} holds ':'"));
    }
    if name.contains(['/', '\0']) {
        return Err(format!("the component {name:?} holds '/' or NUL"));
    }
    Ok(())
}

/// Checks an absolute path strictly (the server's side) and returns its components; the root has none.
pub fn components(path: &str) -> Result<Vec<&str>> {
    if path.len() > MAX_PATH_BYTES {
        return Err(invalid(path, format!("{} bytes are more than {MAX_PATH_BYTES}", path.len())));
    }
    let Some(rest) = path.strip_prefix('/') else {
        return Err(invalid(path, "it must start with '/'"));
    };
    if rest.is_empty() {
        return Ok(Vec::new());
    }
    let parts: Vec<&str> = rest.split('/').collect();
    for part in &parts {
        check_name(part).map_err(|why| invalid(path, why))?;
    }
    Ok(parts)
}

/// Folder of what jobs bring along (executables, cache files), each file under the SHA-256 of its content. Whoever asks for it first has the namenode make
/// it, for everybody to add to.
pub const PROGRAMS: &str = "/.cairn/programs";

/// Directory of the system, left out when the root is listed.
pub const SYSTEM_NAME: &str = ".cairn";
/// Directories in `/.cairn` whose entries are their users': jobs that are not over, and those that are.
pub const USER_AREAS: [&str; 2] = ["jobs", "history"];

/// Is it an entry of [`USER_AREAS`], or below one?
pub fn is_in_user_area(parts: &[&str]) -> bool {
    matches!(parts, [SYSTEM_NAME, area, _, ..] if USER_AREAS.contains(area))
}

/// Refuses paths that belong to the system, for operations that create or change an entry.
pub fn check_not_reserved(path: &str, parts: &[&str]) -> Result<()> {
    let programs = matches!(parts, [SYSTEM_NAME, "programs"] | [SYSTEM_NAME, "programs", _]);
    let theirs = programs || is_in_user_area(parts);
    let system = matches!(parts.first(), Some(&".reserved" | &SYSTEM_NAME)) && !theirs;
    if system || parts.contains(&".snapshot") {
        return Err(invalid(path, "the name is reserved for the system"));
    }
    Ok(())
}

/// What a person may type, made strict (the client's side): several slashes become one, a slash at the end goes.
pub fn normalize(path: &str) -> Result<String> {
    if !path.starts_with('/') {
        return Err(invalid(path, "it must start with '/'"));
    }
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let strict = format!("/{}", parts.join("/"));
    components(&strict)?;
    Ok(strict)
}

/// Parent and last component; `None` for the root.
pub fn split_last(path: &str) -> Option<(&str, &str)> {
    let at = path.rfind('/')?;
    let name = &path[at + 1..];
    if name.is_empty() {
        return None;
    }
    Some((if at == 0 { "/" } else { &path[..at] }, name))
}

/// `parent` and `name` as one path.
pub fn join(parent: &str, name: &str) -> String {
    if parent == "/" { format!("/{name}") } else { format!("{parent}/{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_hdfs_accepts() {
        assert_eq!(components("/").unwrap(), Vec::<&str>::new());
        assert_eq!(components("/a/b c/é%").unwrap(), ["a", "b c", "é%"]);
        assert!(components(&format!("/{}", "x".repeat(255))).is_ok());
    }

    #[test]
    fn refuses_with_the_reason() {
        for (path, why) in [
            ("a", "start with"),
            ("", "start with"),
            ("//a", "empty component"),
            ("/a/", "empty component"),
            ("/a/../b", "not allowed"),
            ("/a:b", "':'"),
        ] {
            let error = components(path).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidPath);
            assert!(error.to_string().contains(why), "{path:?} said {error}");
        }
        assert!(components(&format!("/{}", "x".repeat(256))).is_err());
        assert!(components(&"/x".repeat(4_001)).is_err());
    }

    #[test]
    fn normalizes_what_people_type() {
        assert_eq!(normalize("//a///b/").unwrap(), "/a/b");
        assert_eq!(normalize("/").unwrap(), "/");
        assert!(normalize("a").is_err());
    }

    #[test]
    fn splits_and_joins() {
        assert_eq!(split_last("/a/b"), Some(("/a", "b")));
        assert_eq!(split_last("/a"), Some(("/", "a")));
        assert_eq!(split_last("/"), None);
        assert_eq!(join("/", "a"), "/a");
        assert_eq!(join("/a", "b"), "/a/b");
    }

    #[test]
    fn reserved_names() {
        for path in ["/.reserved/x", "/.cairn", "/.cairn/jobs", "/.cairn/x/y", "/a/.snapshot/s"] {
            assert!(check_not_reserved(path, &components(path).unwrap()).is_err(), "{path}");
        }
        assert!(check_not_reserved(PROGRAMS, &components(PROGRAMS).unwrap()).is_ok());
        for (path, ok) in [
            ("/a/.cairn", true),
            ("/.cairn/programs/ab", true),
            ("/.cairn/programs/a/b", false),
            ("/.cairn/other", false),
            ("/.cairn/jobs/j", true),
            ("/.cairn/history/j/x", true),
        ] {
            assert_eq!(check_not_reserved(path, &components(path).unwrap()).is_ok(), ok, "{path}");
        }
    }
}
