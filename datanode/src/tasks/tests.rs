//! The executor with workers that are shell scripts.

use std::path::Path;
use std::time::Duration;

use cairn_common::durable::{Fs, OpenMode, SystemFs};
use cairn_proto::mapoutput::{Footer, PartitionEntry};
use cairn_proto::pb::task_event::Event as What;
use cairn_proto::{ErrorCode, pb};

use super::owner::Event;
use super::*;
use crate::MapOutputs as _;

/// The command by which a script reports success as a worker does.
fn success() -> String {
    reported(pb::TaskSuccess::default())
}

fn reported(success: pb::TaskSuccess) -> String {
    let report = pb::worker_report::Report::Success(success);
    let sent = cairn_proto::dataplane::encode_delimited(&pb::WorkerReport { report: Some(report) });
    let octal: String = sent.iter().map(|byte| format!("\\{byte:03o}")).collect();
    format!("printf '{octal}'")
}

struct Fixture {
    executor: Executor,
    dir: tempfile::TempDir,
}

async fn executor(script: &str, change: impl FnOnce(&mut TaskSettings)) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = TaskSettings::new(vec![dir.path().to_owned()], 1);
    settings.worker_command = ["sh", "-c", script].map(str::to_owned).to_vec();
    change(&mut settings);
    let name = NodeName { node_id: "n1".into(), host: "dn1".into(), rack: "/r".into() };
    let executor = Executor::start(&Env::system(), settings, name).await.unwrap();
    Fixture { executor, dir }
}

impl Fixture {
    async fn ask<A>(&self, event: impl FnOnce(oneshot::Sender<Result<A>>) -> Event) -> Result<A> {
        let (reply, answer) = oneshot::channel();
        assert!(self.executor.events.send(event(reply)).await.is_ok());
        answer.await.unwrap()
    }

    async fn register(&self, user: &str, job_id: &str, epoch: u64) -> Result<pb::RegisterJobResponse> {
        let job = pb::JobDescription {
            job_id: job_id.into(),
            memory_limit: 64 << 20,
            reducers: 1,
            token: "secret".into(),
            ..Default::default()
        };
        let request = pb::RegisterJobRequest { epoch, job: Some(job) };
        self.ask(|reply| Event::Register { user: user.into(), request, reply }).await
    }

    async fn register_keeping(&self, user: &str, job_id: &str) -> pb::RegisterJobResponse {
        let (job_id, keep) = (job_id.into(), "g".into());
        let job = pb::JobDescription { job_id, keep, memory_limit: 64 << 20, ..Default::default() };
        let request = pb::RegisterJobRequest { epoch: 1, job: Some(job) };
        self.ask(|reply| Event::Register { user: user.into(), request, reply }).await.unwrap()
    }

    async fn release(&self, user: &str) -> Result<pb::ReleaseKeptResponse> {
        let request = pb::ReleaseKeptRequest { keep: "g".into() };
        self.ask(|reply| Event::Release { user: user.into(), request, reply }).await
    }

    async fn start(&self, index: u32, epoch: u64) -> Result<pb::StartTaskResponse> {
        let task = pb::TaskSpec { id: Some(pb::TaskId { index, ..Default::default() }), ..Default::default() };
        let request = pb::StartTaskRequest { job_id: "j".into(), epoch, task: Some(task), backlog: 0 };
        self.ask(|reply| Event::Start { user: "ann".into(), request, reply }).await
    }

    async fn watch(&self, after_sequence: u64) -> Result<pb::WatchTasksResponse> {
        let job_id = "j".into();
        let request = pb::WatchTasksRequest { job_id, epoch: 1, after_sequence, wait_ms: 9_000, status: None };
        self.ask(|reply| Event::Watch { user: "ann".into(), request, reply }).await
    }

    /// The next end of an attempt.
    async fn next_end(&self, after: u64) -> pb::TaskEvent {
        loop {
            let answer = self.watch(after).await.unwrap();
            assert!(answer.events.len() <= 1, "{answer:?}");
            // None: asked again, as drivers do.
            if let Some(event) = answer.events.first() {
                return event.clone();
            }
        }
    }

    async fn next_failure(&self) -> pb::TaskFailure {
        match self.next_end(0).await.event.unwrap() {
            What::Failure(failure) => failure,
            other => panic!("{other:?}"),
        }
    }

    async fn end(&self) -> Result<pb::EndJobResponse> {
        let request = pb::EndJobRequest { job_id: "j".into(), epoch: 1 };
        self.ask(|reply| Event::End { user: "ann".into(), request, reply }).await
    }

    fn jobs(&self) -> Vec<String> {
        SystemFs.read_dir(&self.dir.path().join("jobs")).unwrap().into_iter().map(|entry| entry.name).collect()
    }
}

/// Waits until a file that a script writes is complete; the bound is the test's patience, not its timing.
async fn line_of(path: &Path) -> String {
    for _ in 0..12_000 {
        if let Ok(text) = std::fs::read_to_string(path)
            && text.ends_with('\n')
        {
            return text.trim().to_owned();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{} was never written", path.display());
}

async fn is_gone(pid: &str) -> bool {
    for _ in 0..12_000 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    false
}

fn message(failure: &pb::TaskFailure) -> &str {
    &failure.error.as_ref().unwrap().message
}

#[tokio::test]
async fn a_finished_map_is_kept_and_served_to_who_has_the_token() {
    let script = format!("cp ../../ready work/map-00003-0.out; {}; exec sleep 100", success());
    let fixture = executor(&script, |_| ()).await;
    let entry = PartitionEntry { offset: 0, stored: 7, raw: 7, records: 1 };
    let mut bytes = b"content".to_vec();
    bytes.extend_from_slice(&entry.encode(0));
    bytes.extend_from_slice(&Footer { partitions: 1, index_offset: 7 }.encode());
    let file = SystemFs.open(&fixture.dir.path().join("ready"), OpenMode::Create).unwrap();
    file.write_all_at(&bytes, 0).unwrap();

    let registered = fixture.register("ann", "j", 1).await.unwrap();
    assert_eq!((registered.node_id.as_str(), registered.slots), ("n1", 1));
    fixture.start(3, 1).await.unwrap();
    let event = fixture.next_end(0).await;
    assert!(matches!(event.event, Some(What::Success(_))), "{event:?}");
    assert_eq!(fixture.executor.load().running(), 0);

    let outputs = fixture.executor.outputs();
    let request = pb::ReadMapOutput { job_id: "j".into(), map_index: 3, token: "secret".into(), ..Default::default() };
    let (file, range) = outputs.open(&request).await.unwrap();
    let mut got = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(&mut got, range.start).unwrap();
    assert_eq!(got, b"content");
    for (bad, code) in [
        (pb::ReadMapOutput { token: "guess".into(), ..request.clone() }, ErrorCode::PermissionDenied),
        (pb::ReadMapOutput { map_index: 4, ..request.clone() }, ErrorCode::FileNotFound),
        (pb::ReadMapOutput { job_id: "other".into(), ..request.clone() }, ErrorCode::FileNotFound),
        (pb::ReadMapOutput { partition: 1, ..request.clone() }, ErrorCode::InvalidArgument),
    ] {
        assert_eq!(outputs.open(&bad).await.err().unwrap().code(), code);
    }
    fixture.end().await.unwrap();
    assert!(fixture.jobs().is_empty());
    assert!(outputs.open(&request).await.is_err());
}

#[tokio::test]
async fn a_worker_that_ends_fails_its_attempt_with_its_last_words() {
    let fixture = executor("echo first >&2; echo boom >&2; exit 3", |_| ()).await;
    fixture.register("ann", "j", 1).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    let failure = fixture.next_failure().await;
    assert!(message(&failure).contains("worker of map 0 attempt 0 on dn1 exited with status 3"), "{failure:?}");
    assert_eq!(failure.stderr_tail, "first\nboom");
    let log = fixture.dir.path().join("jobs/j/log/map-00000-0");
    assert_eq!(std::fs::read_to_string(log).unwrap(), "first\nboom\n");
    // What it said can be read when the job is over, by its user.
    fixture.end().await.unwrap();
    let logs = fixture.executor.logs.clone();
    let task = Some(pb::TaskId::default());
    let listed = logs.list("ann".into(), pb::ListLogsRequest { job_id: "j".into() }).await.unwrap();
    assert_eq!(listed.logs, [pb::LogOnNode { task, bytes: 11 }]);
    let request = |offset| pb::ReadLogRequest { job_id: "j".into(), task, offset };
    assert_eq!(logs.read("ann".into(), request(6)).await.unwrap().data, "boom\n");
    assert!(logs.read("ann".into(), request(11)).await.unwrap().data.is_empty());
    assert_eq!(logs.read("bob".into(), request(0)).await.unwrap_err().code(), ErrorCode::PermissionDenied);
    let other = pb::ReadLogRequest { job_id: "../j".into(), ..request(0) };
    assert_eq!(logs.read("ann".into(), other).await.unwrap_err().code(), ErrorCode::InvalidArgument);
    // A start keeps it, until it is old enough.
    let (fs, root): (Arc<dyn Fs>, _) = (Arc::new(SystemFs), fixture.dir.path().join("jobs"));
    super::logs::prepare(&fs, &root, Env::system().clock.wall_ms(), 60_000).unwrap();
    assert_eq!(fixture.jobs(), ["j"]);
    super::logs::prepare(&fs, &root, Env::system().clock.wall_ms() + 60_001, 60_000).unwrap();
    assert!(fixture.jobs().is_empty());
}

#[tokio::test]
async fn a_driver_that_takes_over_finds_what_is_held_and_what_runs() {
    let script = format!("touch work/map-00000-0.out; {}; exec sleep 100", success());
    let fixture = executor(&script, |_| ()).await;
    fixture.register("ann", "j", 1).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    assert!(matches!(fixture.next_end(0).await.event, Some(What::Success(_))));
    fixture.start(1, 1).await.unwrap();
    let found = fixture.register("ann", "j", 2).await.unwrap();
    let map = |index| pb::TaskId { index, ..Default::default() };
    assert_eq!((found.held, found.running), (vec![map(0)], vec![map(1)]));
    let listed = fixture.ask(|reply| Event::List { request: Default::default(), reply }).await.unwrap().jobs;
    assert_eq!((listed[0].user.as_str(), listed[0].epoch, listed[0].outputs), ("ann", 2, 1), "{listed:?}");
    assert_eq!(listed[0].running[0].task, Some(map(1)));
    // Who ends it for good keeps the old drivers out, also where the job was never known.
    for (job_id, user, code) in
        [("j", "bob", Some(ErrorCode::PermissionDenied)), ("j", "ann", None), ("k", "ann", None)]
    {
        let request = pb::EndJobRequest { job_id: job_id.into(), epoch: 3 };
        let ended = fixture.ask(|reply| Event::End { user: user.into(), request, reply }).await;
        assert_eq!(ended.err().map(|error| error.code()), code, "{job_id} {user}");
        if code.is_none() {
            assert_eq!(fixture.register("ann", job_id, 3).await.unwrap_err().code(), ErrorCode::StaleEpoch);
        }
    }
}

#[tokio::test]
async fn a_slot_that_gets_free_is_kept_for_the_job_that_waits() {
    let fixture = executor(&format!("touch work/map-00000-0.out; {}; exec sleep 100", success()), |_| ()).await;
    fixture.register("ann", "j", 1).await.unwrap();
    fixture.register("bob", "k", 1).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    let start_other = || {
        let task = Some(pb::TaskSpec { id: Some(pb::TaskId::default()), ..Default::default() });
        let request = pb::StartTaskRequest { job_id: "k".into(), epoch: 1, task, backlog: 0 };
        fixture.ask(|reply| Event::Start { user: "bob".into(), request, reply })
    };
    let clock = Env::system().clock;
    let began_ms = clock.mono_ms();
    // The first task may be over already: then there is nothing to wait for.
    if let Err(error) = start_other().await {
        assert_eq!(error.code(), ErrorCode::Busy);
        let told = loop {
            let request = pb::WatchTasksRequest { job_id: "k".into(), epoch: 1, wait_ms: 9_000, ..Default::default() };
            let told = fixture.ask(|reply| Event::Watch { user: "bob".into(), request, reply }).await.unwrap();
            if let Some(event) = told.events.into_iter().next() {
                break event.event;
            }
        };
        assert_eq!(told, Some(What::Offer(pb::SlotOffer { slots: 1 })));
        let (same, other) = (fixture.start(1, 1).await, start_other().await);
        // It is kept for a second: a machine that stands still for longer than that shows nothing.
        if clock.mono_ms() - began_ms < 1_000 {
            assert_eq!(same.unwrap_err().code(), ErrorCode::Busy, "it is kept for the other job");
            other.unwrap();
        }
    }
}

#[tokio::test]
async fn a_task_that_stands_still_is_stopped_and_told_why() {
    let fixture = executor("exec sleep 1000", |_| ()).await;
    let job =
        pb::JobDescription { job_id: "j".into(), memory_limit: 64 << 20, task_timeout_ms: 200, ..Default::default() };
    let request = pb::RegisterJobRequest { epoch: 1, job: Some(job) };
    fixture.ask(|reply| Event::Register { user: "ann".into(), request, reply }).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    let failure = fixture.next_failure().await;
    assert!(message(&failure).contains("map 0 attempt 0 on dn1 was stopped: it made no progress"), "{failure:?}");
    assert!(!failure.killed);
}

#[tokio::test]
async fn a_job_that_fills_the_disk_is_stopped_at_its_limit() {
    let script = "head -c 3000000 /dev/zero > work/map-00000-0/spill; exec sleep 1000";
    let fixture = executor(script, |_| ()).await;
    let job =
        pb::JobDescription { job_id: "j".into(), memory_limit: 64 << 20, disk_limit: 2 << 20, ..Default::default() };
    let request = pb::RegisterJobRequest { epoch: 1, job: Some(job) };
    fixture.ask(|reply| Event::Register { user: "ann".into(), request, reply }).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    let failure = fixture.next_failure().await;
    let error = failure.error.as_ref().unwrap();
    assert_eq!(error.code, ErrorCode::DiskFull as i32);
    assert!(error.message.contains("its limit is 2 MiB"), "{error:?}");
}

#[tokio::test]
async fn a_detached_driver_is_a_child_of_the_node_and_its_words_are_kept() {
    let command = |settings: &mut TaskSettings| {
        settings.driver_command = ["sh", "-c", "echo drives \"$@\"; exec sleep 1000", "sh"].map(str::to_owned).to_vec();
    };
    let fixture = executor("true", command).await;
    let request = pb::StartDriverRequest { job_id: "j".into(), namenode: "h:1".into() };
    fixture.ask(|reply| Event::StartDriver { user: "ann".into(), request, reply }).await.unwrap();
    let log = fixture.dir.path().join("jobs/j/log/driver");
    assert_eq!(line_of(&log).await, "drives --namenode h:1 --user ann -- j");
    let listed = fixture.ask(|reply| Event::List { request: Default::default(), reply }).await.unwrap().jobs;
    assert!(listed.len() == 1 && listed[0].drives, "{listed:?}");
    let logs = fixture.executor.logs.clone();
    let request = pb::ReadLogRequest { job_id: "j".into(), ..Default::default() };
    assert!(logs.read("ann".into(), request).await.unwrap().data.starts_with(b"drives"));
    fixture.executor.stop().await;
}

#[tokio::test]
async fn a_worker_that_talks_nonsense_is_ended() {
    let fixture = executor("echo this is not a message; exec sleep 100", |_| ()).await;
    fixture.register("ann", "j", 1).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    assert!(message(&fixture.next_failure().await).contains("signal 9"));
}

#[tokio::test]
async fn a_killed_attempt_takes_its_whole_group_along() {
    let fixture = executor("sleep 1000 & echo $! > child; wait", |_| ()).await;
    fixture.register("ann", "j", 1).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    let child = line_of(&fixture.dir.path().join("jobs/j/child")).await;
    let request = pb::KillTaskRequest { job_id: "j".into(), epoch: 1, task: Some(pb::TaskId::default()) };
    fixture.ask(|reply| Event::Kill { user: "ann".into(), request, reply }).await.unwrap();
    let failure = fixture.next_failure().await;
    assert!(failure.killed, "{failure:?}");
    assert!(is_gone(&child).await);
}

#[tokio::test]
async fn over_its_memory_limit_a_task_is_stopped_and_told_why() {
    // `tail` keeps the one endless line that it is given.
    let fixture = executor("tail -c 500000000 /dev/zero | tail -c 500000000", |_| ()).await;
    fixture.register("ann", "j", 1).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    let failure = fixture.next_failure().await;
    let text = message(&failure);
    assert!(text.starts_with("map 0 attempt 0 on dn1 was stopped: it used "), "{text}");
    assert!(text.ends_with("its limit is 64 MiB"), "{text}");
    assert!(!failure.killed && failure.peak_memory > 64 << 20);
}

#[tokio::test]
async fn a_peak_that_no_sample_saw_fails_the_attempt_all_the_same() {
    // 80 MiB for a moment; then it ends well.
    let report = pb::WorkerReport { report: Some(pb::worker_report::Report::Success(pb::TaskSuccess::default())) };
    let sent = cairn_proto::dataplane::encode_delimited(&report);
    let script = format!(
        "import mmap,os,time\nheld = mmap.mmap(-1, 80 << 20)\nfor at in range(0, 80 << 20, 4096): held[at] = 1\nheld.close()\nos.write(1, bytes({:?}))\ntime.sleep(1000)",
        sent.to_vec()
    );
    let fixture = executor("", |settings| {
        settings.worker_command = ["python3", "-c", &script].map(str::to_owned).to_vec();
    });
    let fixture = fixture.await;
    fixture.register("ann", "j", 1).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    let failure = fixture.next_failure().await;
    let text = message(&failure);
    assert!(text.starts_with("map 0 attempt 0 on dn1 ") && text.ends_with("its limit is 64 MiB"), "{text}");
    assert!(failure.peak_memory > 64 << 20 && !failure.killed, "{failure:?}");
}

#[tokio::test]
async fn a_child_that_needed_too_much_fails_its_attempt() {
    let report = pb::TaskSuccess { peak_memory: 65 << 20, ..Default::default() };
    let fixture = executor(&format!("{}; exec sleep 1000", reported(report)), |_| ()).await;
    fixture.register("ann", "j", 1).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    let failure = fixture.next_failure().await;
    let want = "map 0 attempt 0 on dn1 has ended, but at some time it used 65 MiB of memory, its limit is 64 MiB";
    assert_eq!((message(&failure), failure.peak_memory), (want, 65 << 20));
    assert!(failure.position.is_none());
}

#[tokio::test]
async fn slots_users_and_epochs_are_respected() {
    let fixture = executor("exec sleep 1000", |_| ()).await;
    fixture.register("ann", "j", 2).await.unwrap();
    let code = |result: Result<pb::RegisterJobResponse>| result.unwrap_err().code();
    assert_eq!(code(fixture.register("ann", "j", 1).await), ErrorCode::StaleEpoch);
    assert_eq!(code(fixture.register("bob", "j", 3).await), ErrorCode::PermissionDenied);
    assert_eq!(code(fixture.register("ann", "../j", 1).await), ErrorCode::InvalidArgument);
    assert_eq!(fixture.start(0, 1).await.unwrap_err().code(), ErrorCode::StaleEpoch);
    fixture.start(0, 2).await.unwrap();
    fixture.start(0, 2).await.unwrap();
    let busy = fixture.start(1, 2).await.unwrap_err();
    assert_eq!((busy.code(), busy.message()), (ErrorCode::Busy, "all 1 task slots of dn1 are taken"));
    // A newer driver takes over; the older one is told so.
    fixture.register("ann", "j", 3).await.unwrap();
    assert_eq!(fixture.start(1, 2).await.unwrap_err().code(), ErrorCode::StaleEpoch);
    fixture.executor.stop().await;
}

#[tokio::test]
async fn an_ended_job_stays_ended_for_its_old_driver() {
    let fixture = executor("exec sleep 1000", |_| ()).await;
    fixture.register("ann", "j", 1).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    fixture.end().await.unwrap();
    fixture.end().await.unwrap();
    assert!(fixture.jobs().is_empty());
    assert_eq!(fixture.register("ann", "j", 1).await.unwrap_err().code(), ErrorCode::StaleEpoch);
}

/// Its driver writes the end down after it has told the nodes: until then it must not look as if nobody drove it.
#[tokio::test]
async fn a_job_that_its_driver_has_just_ended_is_listed_as_driven() {
    let fixture = executor("exec sleep 1000", |_| ()).await;
    fixture.register("ann", "j", 1).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    let clock = Env::system().clock;
    let began_ms = clock.mono_ms();
    fixture.end().await.unwrap();
    let list = |job_id: &str| pb::ListJobsRequest { job_id: job_id.into() };
    let listed = fixture.ask(|reply| Event::List { request: list("j"), reply }).await.unwrap().jobs;
    let of_another = fixture.ask(|reply| Event::List { request: list("other"), reply }).await.unwrap().jobs;
    assert!(of_another.is_empty());
    // A machine that stands still for longer than that shows nothing.
    if clock.mono_ms() - began_ms < 3_000 {
        assert_eq!(listed.len(), 1);
        assert_eq!((listed[0].epoch, listed[0].running.len(), &*listed[0].user), (1, 0, "ann"));
        assert!(listed[0].driver_silent_ms < 3_000, "{listed:?}");
    }
}

#[tokio::test]
async fn a_job_whose_driver_is_silent_is_ended() {
    let fixture = executor("echo $$ > pid; exec sleep 1000", |settings| settings.lease_ms = 5_000).await;
    fixture.register("ann", "j", 1).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    // Its driver listens until the task runs.
    let listens = async { while fixture.watch(0).await.is_ok() {} };
    let path = fixture.dir.path().join("jobs/j/pid");
    let pid = tokio::select! {
        pid = line_of(&path) => pid,
        () = listens => panic!("the job was ended before"),
    };
    assert!(is_gone(&pid).await);
    // It was away only: it begins anew, as nobody else has the job.
    loop {
        match fixture.register("ann", "j", 1).await {
            // Its worker's end is not told yet.
            Err(error) if error.code() == ErrorCode::Busy => tokio::time::sleep(Duration::from_millis(1)).await,
            registered => {
                registered.unwrap();
                break;
            }
        }
    }
    fixture.end().await.unwrap();
    let error = fixture.register("ann", "j", 1).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::StaleEpoch, "what was ended does not come back");
}

#[test]
fn who_could_not_be_heard_was_not_silent() {
    let env = Env::system();
    let mut owner = owner::Owner::new(owner::Parts {
        settings: TaskSettings::new(Vec::new(), 1),
        name: NodeName { node_id: "n1".into(), host: "dn1".into(), rack: "/r".into() },
        root: "/nowhere".into(),
        events: mpsc::channel(1).0,
        slots_used: Arc::default(),
        outputs: Arc::new(JobOutputs::new(env.clone())),
        groups: None,
        account: None,
        env,
    });
    let job = job::Job::new(pb::JobDescription::default(), "ann".into(), 1, "/nowhere/j".into(), 1_000);
    owner.jobs.insert("j".into(), job);
    owner.forgive(4_000, 7_000);
    assert_eq!(owner.jobs["j"].silent_ms(7_000), 2_000);
    owner.forgive(4_000, 7_000);
    assert_eq!(owner.jobs["j"].silent_ms(7_000), 0, "heard now, not later");
}

#[tokio::test]
async fn workers_get_a_clean_environment_and_die_with_the_executor() {
    let script = "env > seen; grep NoNewPrivs /proc/self/status > privs; echo $$ > pid; exec sleep 1000";
    let fixture = executor(script, |_| ()).await;
    fixture.register("ann", "j", 1).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    let job = fixture.dir.path().join("jobs/j");
    let pid = line_of(&job.join("pid")).await;
    assert_eq!(line_of(&job.join("privs")).await, "NoNewPrivs:\t1");
    let seen = line_of(&job.join("seen")).await;
    for line in seen.lines() {
        let name = line.split('=').next().unwrap();
        let known = ["PATH", "HOME", "TMPDIR", "LANG", "PWD", "SHLVL", "_", "OLDPWD", "CAIRN_LOG"].contains(&name);
        assert!(known || name.starts_with("MALLOC_"), "{line}");
    }
    let Fixture { executor, dir } = fixture;
    executor.stop().await;
    assert!(is_gone(&pid).await);
    assert!(SystemFs.read_dir(&dir.path().join("jobs")).unwrap().is_empty());
}

#[tokio::test]
async fn tasks_run_as_the_user_that_was_named_and_cannot_reach_the_volume() {
    let named = |settings: &mut TaskSettings| settings.task_user = Some("nobody".into());
    let dir = tempfile::tempdir().unwrap();
    let mut settings = TaskSettings::new(vec![dir.path().join("volume")], 1);
    named(&mut settings);
    if !cairn_common::process::is_root() || cairn_common::process::ids_of("nobody").is_none() {
        let refused = Executor::start(&Env::system(), settings, NodeName::default()).await.err().unwrap();
        assert!(refused.message().contains("task_user"), "{refused}");
        return;
    }
    let volume = dir.path().join("volume");
    SystemFs.create_dir_all(&volume).unwrap();
    SystemFs.restrict(&volume).unwrap();
    // What a task can pass through is for the machine's temporary folder to say; here it must be able to.
    super::account::Account::let_pass(dir.path()).unwrap();
    let script =
        format!("id -un > work/who; ls {} 2> work/denied; echo done >> work/denied; exec sleep 100", volume.display());
    settings.worker_command = ["sh", "-c", &script].map(str::to_owned).to_vec();
    let executor = Executor::start(&Env::system(), settings, NodeName::default()).await.unwrap();
    let fixture = Fixture { executor, dir };
    fixture.register("ann", "j", 1).await.unwrap();
    fixture.start(0, 1).await.unwrap();
    let job = fixture.dir.path().join("volume.jobs/j");
    assert_eq!(line_of(&job.join("work/who")).await, "nobody");
    loop {
        let denied = line_of(&job.join("work/denied")).await;
        if denied.ends_with("done") {
            assert!(denied.contains("ermission denied"), "{denied}");
            break;
        }
    }
    fixture.executor.stop().await;
}

#[tokio::test]
async fn what_an_earlier_process_left_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    SystemFs.create_dir_all(&dir.path().join("jobs/old/out")).unwrap();
    let settings = TaskSettings::new(vec![dir.path().to_owned()], 1);
    let executor = Executor::start(&Env::system(), settings, NodeName::default()).await.unwrap();
    assert!(SystemFs.read_dir(&dir.path().join("jobs")).unwrap().is_empty());
    executor.stop().await;
}

#[tokio::test]
async fn beyond_loopback_jobs_need_leave() {
    let fixture = executor("true", |settings| settings.loopback = false).await;
    let error = fixture.register("ann", "j", 1).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::PermissionDenied);
    assert!(error.message().contains("--allow-jobs"), "{error}");
}

#[tokio::test]
async fn what_jobs_keep_is_for_jobs_of_the_same_user_until_it_is_released() {
    let it = executor("cat", |_| {}).await;
    assert!(it.register_keeping("ann", "j").await.kept.is_empty());
    let folder = it.dir.path().join("jobs/.kept/1");
    for name in ["5.1.64.a.20.raw", "aside-1-0"] {
        SystemFs.open(&folder.join(name), OpenMode::Create).unwrap();
    }
    let kept = pb::KeptContent { inode: 5, offset: 10, length: 32 };
    assert_eq!(it.register_keeping("ann", "j2").await.kept, [kept]);
    assert!(it.register_keeping("bob", "j3").await.kept.is_empty());
    assert_eq!(it.release("ann").await.unwrap_err().code(), ErrorCode::Busy);
    it.release("carol").await.unwrap();
    for job_id in ["j", "j2"] {
        let request = pb::EndJobRequest { job_id: job_id.into(), epoch: 1 };
        it.ask(|reply| Event::End { user: "ann".into(), request, reply }).await.unwrap();
    }
    assert!(folder.exists());
    it.release("ann").await.unwrap();
    assert!(!folder.exists() && it.dir.path().join("jobs/.kept/2").exists(), "it was ann's, not bob's");
    assert!(it.register_keeping("ann", "j4").await.kept.is_empty());
    it.executor.stop().await;
}
