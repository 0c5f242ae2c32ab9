//! Damage to replicas on disk: one block at a time, at least one good replica of it left, and no other block before it is whole again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cairn_client::check::{Borrowed, Checker};
use cairn_client::fs::{Block, FileSystem, LocatedBlock, Replica, ReplicaState};
use cairn_common::Env;
use cairn_common::durable::{Fs, OpenMode};
use cairn_common::entropy::Entropy;

use crate::state::MemberState;

/// A datanode that does not say by then whether its replica is good is asked later.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(300);

/// Damages replicas; see the module.
pub struct Corrupter<'a> {
    pub env: &'a Env,
    pub checker: &'a Checker,
    /// The namenode first; its folder has no replicas.
    pub members: &'a [MemberState],
    pub every: Duration,
    pub random: Entropy,
    /// Replicas damaged.
    pub count: &'a AtomicU64,
    pub say: &'a dyn Fn(String),
}

impl Corrupter<'_> {
    /// Goes on until it is dropped.
    pub async fn run(&self) {
        loop {
            self.env.clock.sleep(self.every).await;
            let Some(file) = self.checker.borrow() else { continue };
            if !self.damage(&file).await {
                continue;
            }
            // The first to notice is a reader (or nobody, if it is served by the good replica).
            file.check().await;
            while !self.is_whole(&file).await {
                self.env.clock.sleep(LOOK_AGAIN).await;
            }
            (self.say)(format!("{} is whole again", file.path()));
        }
    }

    fn fs(&self) -> &FileSystem {
        self.checker.file_system()
    }

    async fn locate(&self, file: &Borrowed) -> Option<Vec<LocatedBlock>> {
        let located = self.env.clock.timeout(ANSWER_LIMIT, self.fs().block_locations(file.path(), 0, 0)).await;
        located.ok()?.ok()
    }

    async fn is_good(&self, replica: &Replica, block: &Block) -> bool {
        let answer = self.env.clock.timeout(ANSWER_LIMIT, self.fs().verify_replica(replica, block)).await;
        matches!(answer, Ok(Ok(_)))
    }

    /// Damages some replicas of one block; `false` if no block has two good ones now.
    async fn damage(&self, file: &Borrowed) -> bool {
        let Some(located) = self.locate(file).await else { return false };
        if located.is_empty() {
            return false;
        }
        let chosen = &located[self.random.below(located.len() as u64) as usize];
        let block = chosen.block.clone().unwrap_or_default();
        let mut good = Vec::new();
        for replica in &chosen.replicas {
            let member = self.members.iter().find(|member| member.id == replica.node_id);
            if let Some(member) = member
                && replica.state() == ReplicaState::Finalized
                && self.is_good(replica, &block).await
            {
                good.push(member);
            }
        }
        if good.len() < 2 {
            return false;
        }
        let count = 1 + self.random.below(good.len() as u64 - 1) as usize;
        let mut damaged = 0;
        for member in &good[..count] {
            let (fs, dir, number) = (Arc::clone(&self.env.fs), member.dir.clone(), self.random.next_u64());
            let (id, generation) = (block.id, block.generation);
            let done = self.env.work.io(move || damage_file(&*fs, &dir, id, generation, number)).await;
            match done {
                Ok(how) => {
                    damaged += 1;
                    self.count.fetch_add(1, Ordering::Relaxed);
                    (self.say)(format!("block {id} on {} {how}", member.name));
                }
                // Moved or deleted meanwhile.
                Err(error) => (self.say)(format!("block {id} on {} was left alone: {error}", member.name)),
            }
        }
        damaged > 0
    }

    /// Every block has as many replicas as the file wants, all of them good. Asking is what makes a node look.
    async fn is_whole(&self, file: &Borrowed) -> bool {
        let status = self.env.clock.timeout(ANSWER_LIMIT, self.fs().status(file.path())).await;
        let (Ok(Ok(status)), Some(located)) = (status, self.locate(file).await) else { return false };
        let mut whole = true;
        for place in &located {
            let block = place.block.clone().unwrap_or_default();
            let mut good = 0;
            for replica in &place.replicas {
                good += u32::from(self.is_good(replica, &block).await);
            }
            whole &= good >= status.replication && good as usize == place.replicas.len();
        }
        whole
    }
}

/// Flips a byte of a block's file, cuts it, or removes it; says which.
fn damage_file(fs: &dyn Fs, dir: &Path, id: i64, generation: u64, number: u64) -> std::io::Result<&'static str> {
    let path = find(fs, dir, &format!("{id}_{generation}_"))?;
    let how = number % 4;
    if how == 3 {
        fs.remove_file(&path)?;
        return Ok("is removed");
    }
    let file = fs.open(&path, OpenMode::Write)?;
    let length = file.len()?;
    let at = (number >> 8) % length.max(1);
    if how == 2 {
        file.set_len(at)?;
        return Ok("is cut");
    }
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    byte[0] ^= 1 << (number >> 4 & 7);
    file.write_all_at(&byte, at)?;
    Ok("has a bit flipped")
}

/// The finalized file whose name begins so.
fn find(fs: &dyn Fs, dir: &Path, prefix: &str) -> std::io::Result<PathBuf> {
    let mut folders = Vec::new();
    for pool in fs.read_dir(dir)?.into_iter().filter(|entry| entry.is_dir) {
        let finalized = dir.join(pool.name).join("finalized");
        if fs.metadata(&finalized)?.is_some() {
            folders.push(finalized);
        }
    }
    while let Some(folder) = folders.pop() {
        for entry in fs.read_dir(&folder)? {
            if entry.is_dir {
                folders.push(folder.join(entry.name));
            } else if entry.name.starts_with(prefix) {
                return Ok(folder.join(entry.name));
            }
        }
    }
    Err(std::io::Error::new(std::io::ErrorKind::NotFound, "it is not there"))
}
