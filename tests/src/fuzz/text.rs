//! What people type: paths, patterns, sizes and times.

use cairn_client::fuzzing::glob_matches;
use cairn_proto::path::{MAX_NAME_BYTES, MAX_PATH_BYTES, check_name, components, join, normalize, split_last};
use cairn_proto::webhdfs::{self, Parameters};

/// The command's own file: a program has no library to link.
#[path = "../../../client/src/cli/units.rs"]
#[allow(dead_code, missing_docs)]
mod units_of_cli;

fn check_strict(path: &str) {
    let parts = components(path).unwrap();
    assert!(path.len() <= MAX_PATH_BYTES && parts.iter().all(|part| (1..=MAX_NAME_BYTES).contains(&part.len())));
    assert_eq!(format!("/{}", parts.join("/")), path);
    assert_eq!(normalize(path).unwrap(), path);
    match split_last(path) {
        Some((parent, name)) => {
            assert_eq!(join(parent, name), path);
            check_name(name).unwrap();
            components(parent).unwrap();
        }
        None => assert_eq!(path, "/"),
    }
}

/// Paths: what is normal stays as it is, and is made of its components.
pub fn paths(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if components(&text).is_ok() {
        check_strict(&text);
    }
    if let Ok(normal) = normalize(&text) {
        check_strict(&normal);
    }
}

/// See [`paths`].
pub fn path_seeds() -> Vec<Vec<u8>> {
    ["/", "/a/b c/é%", "//a///b/", "/a/../b:", &format!("/{}", "x".repeat(255)), &"/xy".repeat(2_700)]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
}

/// Addresses of WebHDFS: what was read is written so that it is read the same again, and no parameter is taken for what it is not.
pub fn web_addresses(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (path, query) = text.split_once('?').unwrap_or((&text, ""));
    if let Ok(path) = webhdfs::path_of(path) {
        check_strict(&path);
        assert_eq!(webhdfs::path_of(&webhdfs::url_path(&path)).unwrap(), path);
    }
    let Ok(parameters) = Parameters::parse(query) else { return };
    assert_eq!(Parameters::parse(&parameters.encode_without(&[])).unwrap(), parameters);
    if let Ok(user) = parameters.user(&[]) {
        assert!(!user.is_empty() && user.len() <= 255 && !user.contains(['/', ':', ' ']), "{user:?}");
    }
    let _ =
        (parameters.op(), parameters.flag("overwrite"), parameters.time("accesstime"), parameters.path("destination"));
    assert!(
        parameters.number("offset").is_ok_and(|number| number <= Some(i64::MAX as u64))
            || parameters.get("offset").is_some()
    );
    assert!(
        parameters.permission("permission").is_ok_and(|mode| mode <= Some(0o1777))
            || parameters.get("permission").is_some()
    );
    assert!(parameters.access("fsaction").map_or(true, |access| access <= 7));
}

/// See [`web_addresses`].
pub fn web_seeds() -> Vec<Vec<u8>> {
    [
        "/webhdfs/v1/a%20b/100%25?op=OPEN&user.name=ann&offset=5&length=9223372036854775807",
        "/webhdfs/v1//a/./b?OP=create&overwrite=True&permission=1755&destination=/x&null=null",
        "/webhdfs/v1?fsaction=r-x&accesstime=-1&doas=bob&sources=/a,/b&x=%ff&y=a+b%2B",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

/// Patterns, a zero byte, and a name: no pattern takes the memory or the day; one without wildcards matches itself alone.
pub fn globs(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (pattern, name) = text.split_once('\0').unwrap_or((&text, "a"));
    let matched = glob_matches(pattern, name);
    if !pattern.contains(['*', '?', '[', ']', '{', '}', '\\', ',']) && pattern.starts_with('/') && !name.contains('/') {
        let wanted = pattern.split('/').filter(|part| !part.is_empty()).any(|part| part == name);
        assert_eq!(matched.unwrap(), wanted, "{pattern:?} {name:?}");
    }
    let plain: String = name.chars().filter(|c| *c != '/').take(MAX_NAME_BYTES / 4).collect();
    let escaped: String = plain.chars().flat_map(|c| ['\\', c]).collect();
    if !plain.is_empty() {
        assert!(glob_matches(&format!("/{escaped}"), &plain).unwrap(), "{plain:?} does not match itself");
        assert!(glob_matches("/*", &plain).unwrap());
    }
}

/// See [`globs`].
pub fn glob_seeds() -> Vec<Vec<u8>> {
    let bomb = "{a,b}".repeat(30);
    let wide = format!("/{{{}}}", ",".repeat(20_000));
    ["/a*b?[a-z]\0axbcd", "/{a,b{c,d}}/[^!-x]*\0bd", "/\\*\0*", "/[]a-]\0]", &format!("/{bomb}\0ab"), &wide]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
}

/// Sizes and times: exact, or refused.
pub fn units(data: &[u8]) {
    use units_of_cli::{grouped, human_millis, human_size, parse_millis, parse_size};
    let text = String::from_utf8_lossy(data);
    let digits: String = text.chars().filter(char::is_ascii_digit).take(25).collect();
    let number = digits.parse::<u128>().ok();
    for (shift, suffix) in [(0, ""), (10, "k"), (20, "MiB"), (30, "g"), (40, "TB")] {
        let exact = number.map(|number| number << shift).and_then(|bytes| u64::try_from(bytes).ok());
        assert_eq!(parse_size(&format!(" {digits}{suffix} ")).ok(), exact, "{digits}{suffix}");
    }
    for (factor, suffix) in [(1, "ms"), (1_000, "s"), (60_000, "m"), (3_600_000, "h"), (86_400_000, "d")] {
        let exact = number.map(|number| number * factor).and_then(|millis| u64::try_from(millis).ok());
        assert_eq!(parse_millis(&format!("{digits}{suffix}")).ok(), exact, "{digits}{suffix}");
    }
    for value in [parse_size(&text), parse_millis(&text)].into_iter().flatten() {
        assert!(text.contains(|c: char| c.is_ascii_digit()), "{text:?} was taken for a number");
        assert!(human_size(value).len() <= 8, "{value} is shown as {}", human_size(value));
        assert_eq!(grouped(value).replace(',', ""), value.to_string());
        assert!(!human_millis(value).is_empty());
    }
}

/// See [`units`].
pub fn unit_seeds() -> Vec<Vec<u8>> {
    ["512", "64k", "1.5g", "2TiB", "30s", "7d", "18446744073709551615", "0.0000001t", ".", "1e9", "16777216.0t"]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
}
