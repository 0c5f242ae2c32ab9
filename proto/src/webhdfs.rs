//! WebHDFS as far as a namenode and a datanode must read it alike: parameters, paths, errors.
//!
//! A request is `/webhdfs/v1<path>?op=OP&user.name=U&...`. Names of parameters and of operations are read in any case, parameters that nobody
//! knows are passed over, an empty value or `null` counts as none, and the first of several counts.

use std::fmt::Write as _;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::error::{Error, ErrorCode, Result};
use crate::path;

/// What every address begins with.
pub const PREFIX: &str = "/webhdfs/v1";
/// Who asks if the request does not say: a user without any rights, as with HDFS.
pub const DEFAULT_USER: &str = "dr.who";
/// Bits of a mode that WebHDFS knows: sticky and `rwxrwxrwx`.
pub const MODE_BITS: u32 = 0o1777;

/// Parameters of a request, at most; clients send fewer than ten.
const MAX_PARAMETERS: usize = 100;
/// Characters of a path or a value that need no escape.
const PLAIN: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
const PLAIN_PATH: AsciiSet = PLAIN.remove(b'/');

/// A request that cannot be meant so.
pub fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::InvalidArgument, message)
}

fn decoded(text: &str, what: &str) -> Result<String> {
    let decoded = percent_decode_str(text).decode_utf8();
    decoded.map(Into::into).map_err(|_| invalid(format!("the {what} is not UTF-8 behind its percent escapes")))
}

/// The path of the file system that a URL's path names; several slashes count as one, and one at the end as none.
pub fn path_of(url_path: &str) -> Result<String> {
    let rest = url_path.strip_prefix(PREFIX).filter(|rest| rest.is_empty() || rest.starts_with('/'));
    let Some(rest) = rest else {
        return Err(invalid(format!("{url_path} does not begin with {PREFIX}/")));
    };
    path::normalize(&format!("/{}", decoded(rest, "path")?))
}

/// The URL's path for a path of the file system.
pub fn url_path(path: &str) -> String {
    format!("{PREFIX}{}", utf8_percent_encode(path, &PLAIN_PATH))
}

/// A path as a part of another URL.
pub fn encoded_path(path: &str) -> String {
    utf8_percent_encode(path, &PLAIN_PATH).to_string()
}

/// The parameters of one request.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Parameters {
    /// Names in lower case.
    pairs: Vec<(String, String)>,
}

impl Parameters {
    /// Reads the part of a URL behind its `?`.
    pub fn parse(query: &str) -> Result<Self> {
        let mut pairs = Vec::new();
        for part in query.split('&').filter(|part| !part.is_empty()) {
            if pairs.len() == MAX_PARAMETERS {
                return Err(invalid(format!("the request has more than {MAX_PARAMETERS} parameters")));
            }
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            // Forms write a blank as a plus; a plus itself is %2B.
            let value = decoded(&value.replace('+', " "), "parameter")?;
            pairs.push((decoded(&name.replace('+', " "), "parameter")?.to_ascii_lowercase(), value));
        }
        Ok(Self { pairs })
    }

    /// The value of a parameter (its name in lower case), if there is one; "null" is none.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.raw(name).filter(|value| !value.is_empty() && *value != "null")
    }

    /// The same for names of files: one may be called "null".
    pub fn raw(&self, name: &str) -> Option<&str> {
        self.pairs.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// A parameter that the operation cannot do without.
    pub fn required(&self, name: &str) -> Result<&str> {
        self.get(name).ok_or_else(|| invalid(format!("the parameter {name} is missing")))
    }

    /// The operation, in capitals.
    pub fn op(&self) -> Result<String> {
        let op = self
            .get("op")
            .ok_or_else(|| invalid("the parameter op is missing: say what to do, as in op=LISTSTATUS"))?;
        Ok(op.to_ascii_uppercase())
    }

    /// In whose name is asked. Only one of `proxy_users` may act for another user (`doas`).
    pub fn user(&self, proxy_users: &[String]) -> Result<&str> {
        let user = self.get("user.name").unwrap_or(DEFAULT_USER);
        let plain = |c: char| !c.is_control() && !c.is_whitespace() && !matches!(c, '/' | ':');
        for (name, user) in [("user.name", Some(user)), ("doas", self.get("doas"))] {
            if let Some(user) = user.filter(|user| user.len() > 255 || !user.chars().all(plain)) {
                return Err(invalid(format!("{name} {:?} is no user name", shortened(user))));
            }
        }
        match self.get("doas") {
            Some(other) if proxy_users.iter().any(|proxy| proxy == user) => Ok(other),
            Some(other) if other != user => {
                let text = format!("User: {user} is not allowed to impersonate {}", shortened(other));
                Err(Error::new(ErrorCode::PermissionDenied, text))
            }
            _ => Ok(user),
        }
    }

    /// `true` or `false`, in any case; false if nothing is said.
    pub fn flag(&self, name: &str) -> Result<bool> {
        self.flag_or(name, false)
    }

    /// `true` or `false`, in any case.
    pub fn flag_or(&self, name: &str, default: bool) -> Result<bool> {
        match self.get(name) {
            None => Ok(default),
            Some(value) if value.eq_ignore_ascii_case("true") => Ok(true),
            Some(value) if value.eq_ignore_ascii_case("false") => Ok(false),
            Some(value) => Err(self.bad(name, value, "true or false")),
        }
    }

    /// A number of 0 or more.
    pub fn number(&self, name: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        // Java's clients know only signed numbers.
        let number = value.parse().ok().filter(|number| *number <= i64::MAX as u64);
        number.map(Some).ok_or_else(|| self.bad(name, value, "a number of 0 or more"))
    }

    /// A number of 0 or more that fits into 32 bits.
    pub fn small_number(&self, name: &str) -> Result<Option<u32>> {
        let Some(number) = self.number(name)? else { return Ok(None) };
        let small = u32::try_from(number).ok();
        small.map(Some).ok_or_else(|| self.bad(name, &number.to_string(), "a number below 2^32"))
    }

    /// Milliseconds since 1970, where -1 says "leave it".
    pub fn time(&self, name: &str) -> Result<Option<u64>> {
        if self.get(name) == Some("-1") { Ok(None) } else { self.number(name) }
    }

    /// A mode in octal digits, as in `755` or `1777`.
    pub fn permission(&self, name: &str) -> Result<Option<u32>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let digits = value.len() <= 4 && value.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
        let mode = u32::from_str_radix(value, 8).ok().filter(|mode| digits && mode & !MODE_BITS == 0);
        mode.map(Some).ok_or_else(|| self.bad(name, value, "a mode such as 644 or 1777, in octal digits"))
    }

    /// An access such as `r-x`, as the sum of 4, 2 and 1.
    pub fn access(&self, name: &str) -> Result<u32> {
        let value = self.required(name)?;
        let letters = value.as_bytes();
        let bit = |at: usize, letter: u8, bit: u32| match letters.get(at) {
            Some(b'-') => Some(0),
            Some(found) if *found == letter => Some(bit),
            _ => None,
        };
        let sum = || Some(bit(0, b'r', 4)? + bit(1, b'w', 2)? + bit(2, b'x', 1)?);
        sum().filter(|_| letters.len() == 3).ok_or_else(|| self.bad(name, value, "an access such as rwx or r--"))
    }

    /// An absolute path.
    pub fn path(&self, name: &str) -> Result<String> {
        path::normalize(self.required(name)?)
    }

    fn bad(&self, name: &str, value: &str, wanted: &str) -> Error {
        invalid(format!("Invalid value for webhdfs parameter \"{name}\": {:?} is not {wanted}", shortened(value)))
    }

    /// All parameters but those `left_out`, escaped, in their order, each after an `&`.
    pub fn encode_without(&self, left_out: &[&str]) -> String {
        let mut out = String::new();
        for (name, value) in self.pairs.iter().filter(|(name, _)| !left_out.contains(&name.as_str())) {
            // Writing to a string cannot fail.
            let _ = write!(out, "&{}={}", encoded_value(name), encoded_value(value));
        }
        out
    }
}

/// A value as a part of a URL.
pub fn encoded_value(value: &str) -> String {
    utf8_percent_encode(value, &PLAIN).to_string()
}

fn shortened(text: &str) -> String {
    text.chars().take(100).collect()
}

/// Is a URL's path one of WebHDFS's?
pub fn is_below(url_path: &str) -> bool {
    url_path.strip_prefix(PREFIX).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Whether a `CREATE` replaces a file that is there: by `overwrite`, or by one of the flags of `createflag`. Flags that ask for what a whole upload
/// does anyway, or for a place to keep it, change nothing.
pub fn overwrites(parameters: &Parameters) -> Result<bool> {
    let mut overwrite = parameters.flag("overwrite")?;
    for flag in parameters.get("createflag").unwrap_or_default().split(',').map(str::trim) {
        match flag.to_ascii_uppercase().as_str() {
            ""
            | "CREATE"
            | "SYNC_BLOCK"
            | "NEW_BLOCK"
            | "LAZY_PERSIST"
            | "NO_LOCAL_WRITE"
            | "NO_LOCAL_RACK"
            | "IGNORE_CLIENT_LOCALITY"
            | "SHOULD_REPLICATE" => {}
            "OVERWRITE" => overwrite = true,
            other => return Err(invalid(format!("createflag {:?} is not known", shortened(other)))),
        }
    }
    Ok(overwrite)
}

/// Fails for an `OPEN` behind the end of a file of `length` bytes, in HDFS's words.
pub fn check_offset(path: &str, offset: u64, length: u64) -> Result<()> {
    if offset == 0 || offset < length {
        return Ok(());
    }
    let text = format!("Offset={offset} out of the range [0, {length}); OPEN, path={path}");
    Err(Error::new(ErrorCode::Io, text).with_subject(path))
}

/// A directory where a file is meant: HDFS says that there is no such file. Other errors stay as they are.
pub fn no_file(error: Error, path: &str) -> Error {
    match error.code() {
        ErrorCode::NotAFile => {
            Error::new(ErrorCode::FileNotFound, format!("Path is not a file: {path}")).with_subject(path)
        }
        _ => error,
    }
}

/// The class by which WebHDFS names an error: as in Hadoop's RPC, but for a bad request.
pub fn java_class(error: &Error) -> &'static str {
    match error.code() {
        ErrorCode::InvalidArgument => "java.lang.IllegalArgumentException",
        _ => error.hadoop_class(),
    }
}

/// The HTTP status of an error: 404 for what is not there, 400 for bad requests and for what is not supported, 500 for faults of the service,
/// 403 for all else, as HDFS has it.
pub fn status_of(error: &Error) -> u16 {
    match error.code() {
        ErrorCode::Internal => 500,
        ErrorCode::InvalidArgument | ErrorCode::InvalidPath | ErrorCode::Unsupported => 400,
        _ if java_class(error) == "java.io.FileNotFoundException" => 404,
        _ => 403,
    }
}

/// The body of an answer that is an error: `{"RemoteException":{"exception","javaClassName","message"}}`.
pub fn remote_exception(error: &Error) -> String {
    let class = java_class(error);
    let name = class.rsplit('.').next().unwrap_or(class);
    let body = serde_json::json!({
        "RemoteException": { "exception": name, "javaClassName": class, "message": error.message() }
    });
    body.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_survive_their_escapes() {
        for path in ["/", "/a", "/with blank/100%/a+b", "/é/ü&?#=;", "/%41"] {
            assert_eq!(path_of(&url_path(path)).unwrap(), path);
        }
        assert_eq!(path_of("/webhdfs/v1").unwrap(), "/");
        assert_eq!(path_of("/webhdfs/v1//a/b%20c/").unwrap(), "/a/b c");
        assert_eq!(url_path("/a b%"), "/webhdfs/v1/a%20b%25");
        for bad in ["/webhdfs/v2/a", "/webhdfs/v1a", "/"] {
            assert_eq!(path_of(bad).unwrap_err().code(), ErrorCode::InvalidArgument, "{bad}");
        }
        for bad in ["/webhdfs/v1/a/../b", "/webhdfs/v1/%2e%2e", "/webhdfs/v1/a:b", "/webhdfs/v1/a%00b"] {
            assert_eq!(path_of(bad).unwrap_err().code(), ErrorCode::InvalidPath, "{bad}");
        }
        assert!(path_of("/webhdfs/v1/%ff").unwrap_err().message().contains("UTF-8"));
    }

    #[test]
    fn parameters_are_read_as_clients_write_them() {
        let parameters = Parameters::parse(
            "OP=liststatus&user.name=ann&user.name=bob&overwrite=True&tempdir=x&length=null&a=b+c%2B&e=",
        )
        .unwrap();
        assert_eq!(parameters.op().unwrap(), "LISTSTATUS");
        assert_eq!(parameters.user(&[]).unwrap(), "ann");
        assert!(parameters.flag("overwrite").unwrap());
        assert!(!parameters.flag("recursive").unwrap());
        assert_eq!(parameters.number("length").unwrap(), None);
        assert_eq!(parameters.get("a"), Some("b c+"));
        assert_eq!(parameters.get("e"), None);
        assert_eq!(
            parameters.encode_without(&["op", "user.name"]),
            "&overwrite=True&tempdir=x&length=null&a=b%20c%2B&e="
        );
        assert_eq!(Parameters::parse("op=X").unwrap().user(&[]).unwrap(), DEFAULT_USER);
        assert!(Parameters::parse(&"a=b&".repeat(101)).is_err());
    }

    #[test]
    fn values_that_cannot_be_meant_are_named() {
        let parameters = Parameters::parse(
            "flag=yes&number=-5&huge=9223372036854775808&permission=888&mode=7777&fsaction=rw&user.name=a/b&time=-1&x=1777&m=644&y=r-x",
        )
        .unwrap();
        let refused = |result: Result<()>, name: &str| {
            let error = result.unwrap_err();
            assert_eq!(status_of(&error), 400);
            assert!(error.message().contains(name), "{error}");
        };
        refused(parameters.flag("flag").map(drop), "flag");
        refused(parameters.number("number").map(drop), "number");
        refused(parameters.number("huge").map(drop), "huge");
        refused(parameters.permission("permission").map(drop), "permission");
        refused(parameters.permission("mode").map(drop), "mode");
        refused(parameters.access("fsaction").map(drop), "fsaction");
        refused(parameters.required("destination").map(drop), "destination");
        refused(parameters.user(&[]).map(drop), "user.name");
        refused(parameters.op().map(drop), "op");
        assert_eq!(parameters.time("time").unwrap(), None);
        assert_eq!(parameters.permission("x").unwrap(), Some(0o1777));
        assert_eq!(parameters.permission("m").unwrap(), Some(0o644));
        assert_eq!(parameters.access("y").unwrap(), 5);
    }

    #[test]
    fn only_those_who_may_act_for_another() {
        let proxies = ["hive".to_owned()];
        let error = Parameters::parse("user.name=ann&doas=bob").unwrap().user(&proxies).unwrap_err();
        assert_eq!((status_of(&error), java_class(&error)), (403, "org.apache.hadoop.security.AccessControlException"));
        assert_eq!(Parameters::parse("user.name=ann&doas=ann").unwrap().user(&[]).unwrap(), "ann");
        assert_eq!(Parameters::parse("user.name=hive&doas=bob").unwrap().user(&proxies).unwrap(), "bob");
        assert!(Parameters::parse("user.name=hive&doas=a/b").unwrap().user(&proxies).is_err());
    }

    #[test]
    fn errors_have_the_classes_and_statuses_of_hdfs() {
        for (code, status, class) in [
            (ErrorCode::FileNotFound, 404, "java.io.FileNotFoundException"),
            (ErrorCode::PermissionDenied, 403, "org.apache.hadoop.security.AccessControlException"),
            (ErrorCode::FileAlreadyExists, 403, "org.apache.hadoop.fs.FileAlreadyExistsException"),
            (ErrorCode::SafeMode, 403, "org.apache.hadoop.hdfs.server.namenode.SafeModeException"),
            (ErrorCode::InvalidArgument, 400, "java.lang.IllegalArgumentException"),
            (ErrorCode::InvalidPath, 400, "org.apache.hadoop.fs.InvalidPathException"),
            (ErrorCode::Unsupported, 400, "java.lang.UnsupportedOperationException"),
            (ErrorCode::NoTargets, 403, "java.io.IOException"),
            (ErrorCode::Internal, 500, "java.io.IOException"),
        ] {
            let error = Error::new(code, "m");
            assert_eq!((status_of(&error), java_class(&error)), (status, class));
        }
        let text = remote_exception(&Error::new(ErrorCode::FileNotFound, "File does not exist: /a\"b"));
        assert_eq!(
            text,
            r#"{"RemoteException":{"exception":"FileNotFoundException","javaClassName":"java.io.FileNotFoundException","message":"File does not exist: /a\"b"}}"#
        );
    }
}
