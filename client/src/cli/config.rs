//! Settings from the file, the environment and `--set`, laid over the defaults.
//!
//! The file has a table per role: `[client]`, `[namenode]`, `[datanode]`. A key of a table is overridden by the variable
//! `CAIRN_<TABLE>_<KEY>` and that by `--set KEY=VALUE`; flags of their own come last. Keys inside an inner table are written with a dot
//! (`core.dead_interval_ms`) and in variables with an underscore; where the last part alone says which key is meant, it is enough.
//! What nobody knows is an error that names it, so that a slip of the pen never becomes a silent default.

use std::collections::BTreeMap;
use std::path::Path;

use cairn_common::Env;
use cairn_common::durable::read_all;
use cairn_proto::{Error, ErrorCode, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::units::{parse_millis, parse_size};

const TABLES: [&str; 3] = ["client", "namenode", "datanode"];
/// Variables that are no settings of a table, though their names start like one.
const NOT_SETTINGS: [&str; 5] = ["CAIRN_NAMENODE", "CAIRN_USER", "CAIRN_CONFIG", "CAIRN_LOG", "CAIRN_PARENT"];
/// A settings file is small; a larger one is something else.
const FILE_LIMIT: u64 = 1 << 20;

/// All that was said about settings.
#[derive(Clone, Debug, Default)]
pub struct Config {
    file: Table,
    /// For messages.
    file_name: String,
    variables: BTreeMap<String, String>,
    sets: Vec<(String, String)>,
}

fn invalid(text: impl Into<String>) -> Error {
    Error::new(ErrorCode::InvalidArgument, text)
}

impl Config {
    /// Reads the file, if one is named, and the environment.
    pub fn load(env: &Env, file: Option<&Path>, sets: &[(String, String)]) -> Result<Self> {
        let mut config = Self { sets: sets.to_vec(), ..Self::default() };
        for (name, value) in std::env::vars_os() {
            let (Ok(name), Ok(value)) = (name.into_string(), value.into_string()) else { continue };
            if name.starts_with("CAIRN_") && !NOT_SETTINGS.contains(&name.as_str()) {
                config.variables.insert(name, value);
            }
        }
        if let Some(path) = file {
            let named = path.display().to_string();
            let bytes = read_all(&*env.fs, path, FILE_LIMIT)
                .map_err(|error| Error::io(format_args!("cannot read the settings {named}"), &error))?;
            let text = String::from_utf8(bytes).map_err(|_| invalid(format!("{named} is no UTF-8 text")))?;
            config.read_file(&named, &text)?;
        }
        Ok(config)
    }

    fn read_file(&mut self, named: &str, text: &str) -> Result<()> {
        self.file = text.parse().map_err(|error: toml::de::Error| {
            let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            invalid(format!("{named}, line {line}: {}", one_line(error.message())))
        })?;
        self.file_name = named.to_owned();
        if let Some(key) = self.file.keys().find(|key| !TABLES.contains(&key.as_str())) {
            let text = format!("{named}: there is no table [{key}]; there are {}", TABLES.join(", "));
            return Err(invalid(text).with_subject(key));
        }
        Ok(())
    }

    /// The settings of one table: `defaults`, then the file, the environment, and `--set`. The latter may name the table
    /// (`namenode.tick_ms`); what names another one is not meant here.
    pub fn table<T: Serialize + DeserializeOwned>(&self, name: &str, defaults: &T) -> Result<T> {
        let Ok(Value::Table(known)) = Value::try_from(defaults) else {
            return Err(Error::new(ErrorCode::Internal, format!("the defaults of [{name}] are no table")));
        };
        let mut table = Table::new();
        match self.file.get(name) {
            None => {}
            Some(Value::Table(given)) => table = given.clone(),
            Some(_) => return Err(invalid(format!("{}: {name} must be a table: [{name}]", self.file_name))),
        }
        let prefix = format!("CAIRN_{}_", name.to_ascii_uppercase());
        for (variable, value) in &self.variables {
            let Some(key) = variable.strip_prefix(&prefix) else { continue };
            let key = key.to_ascii_lowercase();
            insert(&mut table, &known, &key, value).map_err(|why| invalid(format!("{variable}: {why}")))?;
        }
        for (key, value) in &self.sets {
            let own = match key.split_once('.') {
                Some((table, rest)) if table == name => rest,
                Some((table, _)) if TABLES.contains(&table) => continue,
                _ => key,
            };
            insert(&mut table, &known, own, value).map_err(|why| invalid(format!("--set {key}={value}: {why}")))?;
        }
        // Laid over the defaults here, so that a type need not have a default per field.
        let mut merged = known;
        merge(&mut merged, table);
        Value::Table(merged).try_into().map_err(|error: toml::de::Error| {
            let text = format!("{}[{name}]: {}", self.source(), one_line(&error.to_string()));
            invalid(text)
        })
    }

    /// What `--set` says to no table in particular: a command that starts several roles cannot know which is meant.
    pub fn set_without_table(&self) -> Option<&str> {
        let named = |key: &str| key.split_once('.').is_some_and(|(table, _)| TABLES.contains(&table));
        self.sets.iter().map(|(key, _)| key.as_str()).find(|key| !named(key))
    }

    fn source(&self) -> String {
        if self.file_name.is_empty() { "settings ".into() } else { format!("{} ", self.file_name) }
    }
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(given)) => merge(inner, given),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// Every key of `table` as its path.
fn leaves(table: &Table, above: &[String], out: &mut Vec<Vec<String>>) {
    for (key, value) in table {
        let mut path = above.to_vec();
        path.push(key.clone());
        match value {
            Value::Table(inner) if !inner.is_empty() => leaves(inner, &path, out),
            _ => out.push(path),
        }
    }
}

/// Puts `text` at the key that `name` means, as the type that the default has.
fn insert(table: &mut Table, known: &Table, name: &str, text: &str) -> std::result::Result<(), String> {
    let mut all = Vec::new();
    leaves(known, &[], &mut all);
    let wanted = name.to_ascii_lowercase();
    let exact = |path: &&Vec<String>| path.join(".") == wanted || path.join("_") == wanted;
    let by_last = |path: &&Vec<String>| path.last().is_some_and(|last| *last == wanted);
    let found = all.iter().find(exact).or_else(|| {
        let mut hits = all.iter().filter(by_last);
        hits.next().filter(|_| hits.next().is_none())
    });
    // A key whose default is "none" does not show in the defaults: the type itself decides at the end.
    let path = found.cloned().unwrap_or_else(|| wanted.split('.').map(str::to_owned).collect());
    let like = path.iter().try_fold(None, |at: Option<&Value>, key| match at {
        None => known.get(key).map(Some),
        Some(value) => value.get(key).map(Some),
    });
    let value = typed(&path, like.flatten(), text)?;
    let Some((last, above)) = path.split_last() else { return Err("the key is empty".into()) };
    let mut at = table;
    for key in above {
        let inner = at.entry(key.clone()).or_insert_with(|| Value::Table(Table::new()));
        at = inner.as_table_mut().ok_or_else(|| format!("{key} is no table"))?;
    }
    at.insert(last.clone(), value);
    Ok(())
}

/// Text as the value that its key wants: sizes and times may have a suffix.
fn typed(path: &[String], like: Option<&Value>, text: &str) -> std::result::Result<Value, String> {
    let is_time = path.last().is_some_and(|last| last.ends_with("_ms"));
    let number = || {
        let value = if is_time { parse_millis(text)? } else { parse_size(text)? };
        i64::try_from(value).map(Value::Integer).map_err(|_| format!("{text} is too large"))
    };
    match like {
        Some(Value::String(_)) => Ok(Value::String(text.to_owned())),
        Some(Value::Integer(_)) => number(),
        Some(Value::Float(_)) => text.parse().map(Value::Float).map_err(|_| format!("{text:?} is no number")),
        Some(Value::Boolean(_)) => match text {
            "true" | "yes" | "on" | "1" => Ok(Value::Boolean(true)),
            "false" | "no" | "off" | "0" => Ok(Value::Boolean(false)),
            _ => Err(format!("{text:?} is neither true nor false")),
        },
        Some(Value::Array(_)) => {
            Ok(Value::Array(text.split(',').map(|part| Value::String(part.trim().to_owned())).collect()))
        }
        _ => Ok(number().unwrap_or_else(|_| Value::String(text.to_owned()))),
    }
}

/// Several lines of a message as one.
pub fn one_line(text: &str) -> String {
    let parts: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
    #[serde(default, deny_unknown_fields)]
    struct Inner {
        dead_interval_ms: u64,
        listen: String,
    }

    impl Default for Inner {
        fn default() -> Self {
            Self { dead_interval_ms: 30_000, listen: "inner".into() }
        }
    }

    #[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
    #[serde(default, deny_unknown_fields)]
    struct Settings {
        listen: String,
        cache_bytes: u64,
        threshold: f64,
        verbose: bool,
        dirs: Vec<String>,
        rack: Option<String>,
        core: Inner,
    }

    impl Default for Settings {
        fn default() -> Self {
            Self {
                listen: "127.0.0.1:1".into(),
                cache_bytes: 1,
                threshold: 0.5,
                verbose: false,
                dirs: Vec::new(),
                rack: None,
                core: Inner::default(),
            }
        }
    }

    fn config(file: &str, variables: &[(&str, &str)], sets: &[(&str, &str)]) -> Result<Config> {
        let pairs = |list: &[(&str, &str)]| list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let sets: BTreeMap<String, String> = pairs(sets);
        let mut config = Config { variables: pairs(variables), sets: sets.into_iter().collect(), ..Default::default() };
        config.read_file("c.toml", file)?;
        Ok(config)
    }

    fn namenode(file: &str, variables: &[(&str, &str)], sets: &[(&str, &str)]) -> Result<Settings> {
        config(file, variables, sets)?.table("namenode", &Settings::default())
    }

    #[test]
    fn later_layers_win_and_types_follow_the_defaults() {
        let file = "[namenode]\nlisten = \"a:1\"\ncache_bytes = 5\n[namenode.core]\ndead_interval_ms = 7\n[client]\n";
        let variables = [("CAIRN_NAMENODE_CACHE_BYTES", "64k"), ("CAIRN_NAMENODE_DIRS", "/a, /b")];
        let sets = [
            ("namenode.dead_interval_ms", "3s"),
            ("datanode.listen", "not ours"),
            ("verbose", "yes"),
            ("threshold", "1"),
            ("rack", "/r1"),
        ];
        let settings = namenode(file, &variables, &sets).unwrap();
        assert_eq!(settings.listen, "a:1");
        assert_eq!(settings.cache_bytes, 64 << 10);
        assert_eq!(settings.core, Inner { dead_interval_ms: 3_000, listen: "inner".into() });
        assert!(settings.verbose && settings.dirs == ["/a", "/b"]);
        assert_eq!(settings.rack.as_deref(), Some("/r1"));
    }

    #[test]
    fn inner_keys_by_their_path() {
        let variables = [("CAIRN_NAMENODE_CORE_LISTEN", "x")];
        let settings = namenode("", &variables, &[("core.dead_interval_ms", "9")]).unwrap();
        assert_eq!(settings.core, Inner { dead_interval_ms: 9, listen: "x".into() });
        // The outer key is meant when the name fits both.
        assert_eq!(namenode("", &[], &[("listen", "y")]).unwrap().listen, "y");
    }

    #[test]
    fn nothing_unknown_and_nothing_wrong_passes_silently() {
        for (file, variables, sets, said) in [
            ("[namenode]\nlisen = \"a\"", vec![], vec![], "lisen"),
            ("[namenod]\n", vec![], vec![], "[namenod]"),
            ("[namenode]\ncache_bytes = \"many\"", vec![], vec![], "cache_bytes"),
            ("[namenode\n", vec![], vec![], "line 1"),
            ("", vec![("CAIRN_NAMENODE_LISEN", "a")], vec![], "lisen"),
            ("", vec![("CAIRN_NAMENODE_CACHE_BYTES", "many")], vec![], "CAIRN_NAMENODE_CACHE_BYTES"),
            ("", vec![], vec![("lisen", "a")], "lisen"),
            ("", vec![], vec![("verbose", "maybe")], "verbose"),
        ] {
            let error = namenode(file, &variables, &sets).unwrap_err().to_string();
            assert!(error.contains(said) && !error.contains('\n'), "{file:?}: {error}");
        }
    }
}
