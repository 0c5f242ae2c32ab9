use clap::CommandFactory;

use super::*;

fn parse(line: &[&str]) -> Result<Cli, String> {
    Cli::try_parse_from(std::iter::once(&"cairn").chain(line)).map_err(|error| error.to_string())
}

fn refused(line: &[&str]) -> String {
    let error = Cli::try_parse_from(std::iter::once(&"cairn").chain(line)).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{line:?}");
    error.to_string()
}

#[test]
fn the_parser_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn the_overview_names_every_command_with_its_own_line() {
    let command = Cli::command();
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        let start = format!("\n  {:<13} ", sub.get_name());
        assert!(COMMANDS.contains(&start), "{} is missing", sub.get_name());
    }
    let help = Cli::command().render_help().to_string();
    assert!(help.contains("wordcount, grep, sort") && help.contains("--namenode"), "{help}");
}

#[test]
fn global_flags_stand_anywhere() {
    let cli = parse(&["--json", "ls", "/", "--namenode", "host:1", "--user", "ann"]).unwrap();
    assert!(cli.global.json);
    assert_eq!(cli.global.namenode.as_deref(), Some("host:1"));
    assert_eq!(cli.global.user.as_deref(), Some("ann"));
    let cli = parse(&["datanode", "--namenode", "127.0.0.1:8020", "--dir", "/a,/b"]).unwrap();
    let Command::Datanode(args) = cli.command else { panic!() };
    assert_eq!(args.dir.len(), 2);
}

#[test]
fn bad_numbers_are_usage_errors_with_a_reason() {
    assert!(refused(&["put", "--replication", "0", "a", "/a"]).contains("outside 1 to 512"));
    assert!(refused(&["put", "--replication", "600", "a", "/a"]).contains("outside 1 to 512"));
    assert!(refused(&["put", "--block-size", "1", "a", "/a"]).contains("multiple of 512"));
    assert!(refused(&["put", "--block-size", "1t", "a", "/a"]).contains("16g"));
    assert!(refused(&["put", "--block-size", "1000", "a", "/a"]).contains("multiple of 512"));
    assert!(refused(&["put", "--block-size", "many", "a", "/a"]).contains("no size"));
    assert!(refused(&["setrep", "0", "/a"]).contains("outside"));
    assert!(refused(&["local", "--datanodes", "0"]).contains('0'));
    assert!(refused(&["chmod", "999", "/a"]).contains("no mode"));
}

#[test]
fn bad_paths_are_usage_errors() {
    for path in ["a", "/a/../b", "", "/a:b"] {
        assert!(refused(&["ls", path]).contains("invalid path"), "{path}");
    }
    assert!(refused(&["cat", &format!("/{}", "x".repeat(256))]).contains("longer than 255"));
}

#[test]
fn jobs_and_their_tasks_are_named_as_they_are_listed() {
    let Command::Job(JobCommand::Logs(logs)) = parse(&["job", "logs", "job-1-a", "m3.0"]).unwrap().command else {
        panic!()
    };
    assert_eq!((logs.id.as_str(), logs.task.as_deref()), ("job-1-a", Some("m3.0")));
    assert!(refused(&["job", "logs", "job-1", "x3"]).contains("is no task"));
    assert!(refused(&["job", "status", "../x"]).contains("no id of a job"));
    let line = ["job", "run", "--detach", "--", "wordcount", "--reducers", "2", "/a", "/b"];
    let Command::Job(JobCommand::Run(run)) = parse(&line).unwrap().command else { panic!() };
    assert!(run.detach && run.command == line[4..]);
    let line = ["job", "wordcount", "--priority", "high", "--task-cpu", "0.5", "--time-limit", "2m", "/a", "/b"];
    let Command::Job(JobCommand::Wordcount(args)) = parse(&line).unwrap().command else { panic!() };
    assert_eq!((args.job.priority, args.job.task_cpu, args.job.time_limit), (Some(400), Some(500), Some(120_000)));
    assert!(refused(&["job", "wordcount", "--priority", "0", "/a", "/b"]).contains("no priority"));
}

#[test]
fn what_later_issues_bring_is_unknown_today() {
    assert!(refused(&["admin", "balance"]).contains("unrecognized subcommand"));
}

#[test]
fn letters_mean_what_they_mean_in_hdfs() {
    let Command::Ls(ls) = parse(&["ls", "-R", "-h", "/a"]).unwrap().command else { panic!() };
    assert!(ls.recursive && ls.human);
    let Command::Ls(ls) = parse(&["ls"]).unwrap().command else { panic!() };
    assert_eq!(ls.paths, ["/"]);
    let Command::Chmod(chmod) = parse(&["chmod", "-R", "-w", "/a"]).unwrap().command else { panic!() };
    assert!(chmod.recursive);
    assert_eq!(chmod.mode.apply(0o777, false), 0o555);
    let Command::Chown(chown) = parse(&["chown", ":staff", "/a"]).unwrap().command else { panic!() };
    assert_eq!(chown.owner, Owner { user: String::new(), group: "staff".into() });
}

#[cfg(unix)]
#[test]
fn bytes_that_are_not_utf8_are_a_usage_error() {
    use std::os::unix::ffi::OsStrExt;
    let bad = std::ffi::OsStr::from_bytes(b"/a\xff");
    let error = Cli::try_parse_from([std::ffi::OsStr::new("cairn"), "ls".as_ref(), bad]).unwrap_err();
    assert_eq!(error.exit_code(), 2);
}
