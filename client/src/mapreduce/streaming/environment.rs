//! The environment of a streaming child: what Hadoop Streaming's scripts look for.

use std::process::Command;

use crate::mapreduce::{TaskContext, TaskKind};

/// Properties with values longer than this are left out, so that the environment does not grow beyond what `exec` takes.
const MAX_VALUE_BYTES: usize = 20_000;

/// Sets all job properties (what is neither letter nor digit in their names turned to `_`) and what tells the task about itself.
pub fn set(command: &mut Command, task: &TaskContext) {
    // The worker's allocator settings are not meant for other programs.
    for name in ["MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"] {
        command.env_remove(name);
    }
    for (name, value) in task.properties.iter().filter(|(_, value)| value.len() <= MAX_VALUE_BYTES) {
        command.env(variable(name), value);
    }
    for (name, value) in of_task(task) {
        command.env(name, value);
    }
}

fn variable(property: &str) -> String {
    property.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

fn of_task(task: &TaskContext) -> Vec<(&'static str, String)> {
    let is_map = task.kind == TaskKind::Map;
    let letter = if is_map { 'm' } else { 'r' };
    let job = variable(task.job_id.strip_prefix("job-").unwrap_or(&task.job_id));
    let task_id = format!("task_{job}_{letter}_{:06}", task.index);
    let attempt_id = format!("attempt_{job}_{letter}_{:06}_{}", task.index, task.attempt);
    let mut all = vec![
        ("mapreduce_job_id", task.job_id.clone()),
        ("mapred_job_id", task.job_id.clone()),
        ("mapreduce_task_id", task_id.clone()),
        ("mapred_tip_id", task_id),
        ("mapreduce_task_attempt_id", attempt_id.clone()),
        ("mapred_task_id", attempt_id),
        ("mapreduce_task_partition", task.index.to_string()),
        ("mapred_task_partition", task.index.to_string()),
        ("mapreduce_task_ismap", is_map.to_string()),
        ("mapred_task_is_map", is_map.to_string()),
        ("mapreduce_job_maps", task.maps.to_string()),
        ("mapreduce_job_reduces", task.reducers.to_string()),
        ("mapred_reduce_tasks", task.reducers.to_string()),
        ("mapreduce_job_user_name", task.user.clone()),
    ];
    if let Some(input) = &task.input {
        all.extend([
            ("mapreduce_map_input_file", input.path.clone()),
            ("map_input_file", input.path.clone()),
            ("mapreduce_map_input_start", input.offset.to_string()),
            ("map_input_start", input.offset.to_string()),
            ("mapreduce_map_input_length", input.length.to_string()),
            ("map_input_length", input.length.to_string()),
        ]);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_hadoop() {
        let task = TaskContext {
            job_id: "job-17-ab".into(),
            index: 3,
            attempt: 1,
            properties: std::sync::Arc::new([("my.own-key".to_owned(), "v".to_owned())].into()),
            ..TaskContext::default()
        };
        let mut command = Command::new("x");
        set(&mut command, &task);
        let value = |name: &str| {
            let found = command.get_envs().find(|(key, _)| *key == name);
            found.and_then(|(_, value)| value).map(|value| value.to_string_lossy().into_owned())
        };
        assert_eq!(value("my_own_key").as_deref(), Some("v"));
        assert_eq!(value("mapreduce_task_id").as_deref(), Some("task_17_ab_m_000003"));
        assert_eq!(value("mapreduce_task_attempt_id").as_deref(), Some("attempt_17_ab_m_000003_1"));
        assert_eq!(value("mapreduce_task_ismap").as_deref(), Some("true"));
        assert_eq!(value("mapreduce_map_input_file"), None);
    }
}
