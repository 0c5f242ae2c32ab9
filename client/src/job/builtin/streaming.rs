//! Streaming jobs: commands, files and Hadoop's properties turned into a specification.

use std::path::{Path, PathBuf};

use cairn_proto::{Error, ErrorCode, Result};

use crate::fs::FileSystem;
use crate::job::ship::CacheFile;
use crate::job::spec::{DEFAULT_TASK_TIMEOUT_MS, JobSpec, MAX_ATTEMPTS, SLOW_START};
use crate::mapreduce::streaming::property;

/// What a streaming job is made of.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StreamingOptions {
    /// Commands, as [`crate::mapreduce::streaming`] runs them.
    pub mapper: String,
    /// `None`: the sorted records are the output. "NONE": what the maps print is.
    pub reducer: Option<String>,
    /// Joins records of a map before they are shuffled.
    pub combiner: Option<String>,
    /// "hash" or "fields", or the name of the class that Hadoop has for the latter.
    pub partitioner: Option<String>,
    /// Names and values.
    pub properties: Vec<(String, String)>,
}

const HADOOPS_PARTITIONERS: [&str; 2] = [
    "org.apache.hadoop.mapred.lib.KeyFieldBasedPartitioner",
    "org.apache.hadoop.mapreduce.lib.partition.KeyFieldBasedPartitioner",
];

/// A streaming job on the inputs of `base`. Of the properties, those that Hadoop has for what a specification says (its name, reducers, memory,
/// replication, split size, time-out, attempts) set that, unless `base` does.
pub fn streaming(mut base: JobSpec, options: &StreamingOptions) -> Result<JobSpec> {
    base.kind = "streaming".into();
    for (name, value) in &options.properties {
        apply(&mut base, name, value)?;
        base.properties.insert(name.clone(), value.clone());
    }
    base = base.with(property::MAPPER, &options.mapper);
    match options.reducer.as_deref() {
        Some("NONE") => match base.reducers {
            None | Some(0) => base.reducers = Some(0),
            Some(reducers) => {
                let text = format!("a job without a reducer (NONE) has no {reducers} reducers");
                return Err(Error::new(ErrorCode::InvalidArgument, text));
            }
        },
        Some(reducer) if base.reducers != Some(0) => base = base.with(property::REDUCER, reducer),
        // As in Hadoop: with 0 reducers the reducer is not looked at.
        _ => {}
    }
    if let Some(combiner) = &options.combiner {
        base = base.with(property::COMBINER, combiner);
    }
    if let Some(partitioner) = &options.partitioner {
        let known = if HADOOPS_PARTITIONERS.contains(&partitioner.as_str()) { "fields" } else { partitioner };
        base = base.with(property::PARTITIONER, known);
    }
    Ok(base)
}

/// Stores the files that lie beside the commands in the cluster, for a job that [`streaming`] made.
pub async fn ship(fs: &FileSystem, mut spec: JobSpec, files: &[PathBuf]) -> Result<JobSpec> {
    spec.validate()?;
    let mut plain = Vec::new();
    for local in files {
        let name = local.file_name().unwrap_or_default().to_string_lossy();
        if let Some(other) = spec.cache_files.iter().find(|file| file.name == name) {
            let text = format!("two files of the job are named {}: give one of them another name", other.name);
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        let file = CacheFile::of_local(fs, &name, Path::new(local)).await?;
        if !file.executable {
            plain.push(file.name.clone());
        }
        spec.cache_files.push(file);
    }
    // Nodes keep files by their content, whatever their modes were.
    Ok(spec.with(property::PLAIN_FILES, &plain.join(" ")))
}

/// What Hadoop's property `name` says of a job.
fn apply(spec: &mut JobSpec, name: &str, value: &str) -> Result<()> {
    let number = || -> Result<u64> {
        value.parse().map_err(|_| {
            Error::new(ErrorCode::InvalidArgument, format!("property {name}: {value:?} is no number"))
                .with_subject(name)
        })
    };
    match name {
        "mapreduce.job.name" | "mapred.job.name" => spec.name = value.to_owned(),
        "mapreduce.job.reduces" | "mapred.reduce.tasks" => {
            let reducers = u32::try_from(number()?).unwrap_or(u32::MAX);
            spec.reducers.get_or_insert(reducers);
        }
        // Tasks of both kinds have one limit: the larger of the two.
        "mapreduce.map.memory.mb" | "mapreduce.reduce.memory.mb" => {
            spec.memory_limit = spec.memory_limit.max(number()?.saturating_mul(1 << 20));
        }
        "mapreduce.input.fileinputformat.split.maxsize" | "mapred.max.split.size" if spec.split_bytes == 0 => {
            spec.split_bytes = number()?;
        }
        "mapreduce.task.timeout" | "mapred.task.timeout" if spec.task_timeout_ms == DEFAULT_TASK_TIMEOUT_MS => {
            spec.task_timeout_ms = number()?;
        }
        "mapreduce.map.maxattempts" | "mapreduce.reduce.maxattempts" if spec.max_attempts == MAX_ATTEMPTS => {
            spec.max_attempts = u32::try_from(number()?).unwrap_or(u32::MAX);
        }
        "mapreduce.job.reduce.slowstart.completedmaps" if spec.slow_start == SLOW_START => {
            let part = value.parse::<f64>().ok().filter(|part| (0.0..=1.0).contains(part)).ok_or_else(|| {
                let text = format!("property {name}: {value:?} is no part of the maps, 0 to 1");
                Error::new(ErrorCode::InvalidArgument, text).with_subject(name)
            })?;
            spec.slow_start = (part * 1_000.0).round() as u32;
        }
        "mapreduce.map.speculative" | "mapreduce.reduce.speculative" if value == "false" => spec.speculative = false,
        "dfs.replication" if spec.output_replication == 0 => {
            spec.output_replication = u32::try_from(number()?).unwrap_or(u32::MAX);
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(base: JobSpec, options: StreamingOptions) -> Result<JobSpec> {
        let spec = streaming(base, &options)?;
        spec.validate()?;
        Ok(spec)
    }

    fn base() -> JobSpec {
        JobSpec::new("streaming", vec!["/in".into()], "/out")
    }

    fn options(properties: &[(&str, &str)]) -> StreamingOptions {
        let properties = properties.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        StreamingOptions {
            mapper: "cat".into(),
            reducer: Some("wc -l".into()),
            properties,
            ..StreamingOptions::default()
        }
    }

    #[test]
    fn hadoops_properties_say_what_a_job_is_like() {
        let properties = [
            ("mapreduce.job.name", "mine"),
            ("mapreduce.job.reduces", "7"),
            ("mapreduce.map.memory.mb", "512"),
            ("dfs.replication", "2"),
            ("mapreduce.task.timeout", "30000"),
            ("mapreduce.map.maxattempts", "2"),
            ("mapreduce.job.reduce.slowstart.completedmaps", "0.05"),
            ("my.own", "x"),
        ];
        let spec = make(base(), options(&properties)).unwrap();
        assert_eq!(
            (spec.name.as_str(), spec.reducers, spec.memory_limit, spec.output_replication),
            ("mine", Some(7), 512 << 20, 2)
        );
        assert_eq!((spec.task_timeout_ms, spec.max_attempts, spec.slow_start), (30_000, 2, 50));
        assert_eq!(spec.properties["my.own"], "x");
        let spec = make(JobSpec { reducers: Some(2), ..base() }, options(&properties)).unwrap();
        assert_eq!(spec.reducers, Some(2), "an argument counts more than a property");
        let error = make(base(), options(&[("mapreduce.job.reduces", "many")])).unwrap_err();
        assert!(error.message().contains("mapreduce.job.reduces") && error.message().contains("many"), "{error}");
        let error = make(base(), options(&[("mapreduce.job.reduces", "70000")])).unwrap_err();
        assert!(error.message().contains("70000 reducers are more than 65536"), "{error}");
    }

    #[test]
    fn without_reducers_the_maps_write_the_output() {
        let none = StreamingOptions { reducer: Some("NONE".into()), ..options(&[]) };
        assert_eq!(make(base(), none.clone()).unwrap().reducers, Some(0));
        assert!(make(JobSpec { reducers: Some(3), ..base() }, none).is_err());
        let spec = make(base(), options(&[("mapreduce.job.reduces", "0")])).unwrap();
        assert!(!spec.properties.contains_key(property::REDUCER));
        let combined = StreamingOptions { combiner: Some("cat".into()), reducer: Some("NONE".into()), ..options(&[]) };
        assert!(make(base(), combined).unwrap_err().message().contains("combiner"));
    }

    #[test]
    fn partitioners_have_hadoops_names_too() {
        for name in ["fields", HADOOPS_PARTITIONERS[0]] {
            let partitioner = Some(name.to_owned());
            let spec = make(base(), StreamingOptions { partitioner, ..options(&[(property::PARTITION_FIELDS, "1")]) })
                .unwrap();
            assert_eq!(spec.properties[property::PARTITIONER], "fields");
        }
        let partitioner = Some("my.Partitioner".to_owned());
        assert!(make(base(), StreamingOptions { partitioner, ..options(&[]) }).is_err());
    }
}
