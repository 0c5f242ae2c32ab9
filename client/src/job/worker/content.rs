//! The content of a map's split: what is kept of it on this node, and else from the cluster.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Buf as _, Bytes};
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::kept::{Keeping, KeptReader, Tee};
use super::{Context, PIECES, Progress};
use crate::fs::{FileReader, FileStatus};
use crate::mapreduce::InputFormat;
use crate::mapreduce::container::HEADER_BYTES;
use crate::mapreduce::input::{BoxedFeed, Feed, content_of, feed_start};

type Piece = Result<Bytes>;

/// A split that was opened.
pub struct Opened {
    /// Its content, as it is read.
    pub content: BoxedFeed,
    /// What happens to it besides.
    pub aside: Aside,
}

/// What goes on beside the reading of a split.
pub struct Aside {
    reading: JoinHandle<()>,
    keeping: Keeping,
    file: FileStatus,
    start: u64,
    decoded: bool,
}

impl Aside {
    /// Nothing more is read.
    pub fn stop(&self) {
        self.reading.abort();
    }

    /// The task has succeeded: what it has read is kept, if that is wanted. Blocks.
    pub fn keep(self) {
        self.keeping.finish(&self.file, self.start, self.decoded);
    }
}

/// Opens the split; reads ahead of who takes the content.
pub async fn open(
    context: &Context,
    split: &pb::Split,
    format: InputFormat,
    progress: &Arc<Progress>,
) -> Result<Opened> {
    let mut reader = context.files().await?.open(&split.path).await?;
    if reader.length() < split.offset + split.length {
        let text = format!(
            "{} has {} bytes now, it had {} when the job was planned",
            split.path,
            reader.length(),
            split.file_length
        );
        return Err(Error::new(ErrorCode::FileNotFound, text).with_subject(split.path.clone()));
    }
    let mut head = None;
    if format == InputFormat::KeyValue {
        head = Some(reader.read_range(0, HEADER_BYTES).await?);
    }
    let (file, start) = (reader.status().clone(), feed_start(split, format));
    let decoded = format.compression(&split.path).is_some();
    let (found, keeping) = look(context, &file, split, start, decoded).await;
    reader.limit_read_ahead(split.offset + split.length);
    let (cluster, reading) = Cluster::of(reader, Arc::clone(progress));
    let about = split.clone();
    let decode = move |bytes: BoxedFeed| content_of(&about, format, bytes);
    let state = match found {
        None => {
            let bytes = cluster.from(start);
            State::Cluster(Lazy::of(move || decode(Box::new(bytes))))
        }
        Some(Found { reader, decoded: false }) => {
            let rest: Rest = Box::new(move |position| Box::new(cluster.from(position)));
            let bytes = Content { state: State::Kept(reader, rest), progress: Arc::clone(progress) };
            State::Cluster(Lazy::of(move || decode(Box::new(bytes))))
        }
        Some(Found { reader, decoded: true }) => {
            // Compressed content has no other beginning than the first.
            let rest: Rest = Box::new(move |left| {
                let feed = Lazy::of(move || decode(Box::new(cluster.from(0))));
                Box::new(Behind { feed, left })
            });
            State::Kept(reader, rest)
        }
    };
    let mut content: BoxedFeed = Box::new(Content { state, progress: Arc::clone(progress) });
    if let Some(keeping) = keeping.clone() {
        content = Box::new(Tee { feed: content, keeping });
    }
    if head.is_some() {
        content = Box::new(After { head, feed: content });
    }
    let aside = Aside { reading, keeping: keeping.unwrap_or_default(), file, start, decoded };
    Ok(Opened { content, aside })
}

/// What is kept of a split.
struct Found {
    reader: KeptReader,
    /// It is what the file holds, not its bytes.
    decoded: bool,
}

/// Looks for what is kept; if that is not all of the split and it is wanted, it is to be kept as it is read.
async fn look(
    context: &Context,
    file: &FileStatus,
    split: &pb::Split,
    start: u64,
    decoded: bool,
) -> (Option<Found>, Option<Keeping>) {
    let Some(kept) = context.kept.clone() else { return (None, None) };
    let (file, keep, end) = (file.clone(), split.keep, split.offset + split.length);
    let look = move || {
        let find = |decoded| kept.find(&file, decoded, start).map(|reader| Found { reader, decoded });
        let found = if decoded { find(true).or_else(|| find(false)) } else { find(false) };
        // The neighbour's content goes on into this split by a byte or more.
        let is_complete = |found: &Found| found.decoded == decoded && (decoded || found.reader.end() >= end);
        let complete = found.as_ref().is_some_and(is_complete);
        let keeping = (keep && !complete).then(|| Keeping::with(kept.keeper()));
        (found, keeping)
    };
    context.env.work.io(look).await
}

/// Gives what follows an offset, from the cluster.
type Rest = Box<dyn FnOnce(u64) -> BoxedFeed + Send>;

/// What is kept, then the rest.
struct Content {
    state: State,
    progress: Arc<Progress>,
}

enum State {
    Kept(KeptReader, Rest),
    Cluster(BoxedFeed),
    Over,
}

impl Feed for Content {
    fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            match std::mem::replace(&mut self.state, State::Over) {
                State::Kept(mut kept, rest) => match kept.next() {
                    Ok(Some(piece)) => {
                        self.progress.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
                        self.progress.kept.fetch_add(piece.len() as u64, Ordering::Relaxed);
                        self.state = State::Kept(kept, rest);
                        return Ok(Some(piece));
                    }
                    Ok(None) if kept.is_to_the_end() => {}
                    Ok(None) => self.state = State::Cluster(rest(kept.position())),
                    Err(error) => {
                        tracing::warn!(%error, "kept content is damaged: the rest is read from the cluster");
                        self.state = State::Cluster(rest(kept.position()));
                        kept.remove();
                    }
                },
                State::Cluster(mut feed) => {
                    let piece = feed.next()?;
                    self.state = State::Cluster(feed);
                    return Ok(piece);
                }
                State::Over => return Ok(None),
            }
        }
    }
}

/// A feed that is made when the first piece is asked for: a decompressor may read, which only the computing thread may wait for.
enum Lazy {
    Not(Box<dyn FnOnce() -> Result<BoxedFeed> + Send>),
    Made(BoxedFeed),
    Failed,
}

impl Lazy {
    fn of(make: impl FnOnce() -> Result<BoxedFeed> + Send + 'static) -> BoxedFeed {
        Box::new(Self::Not(Box::new(make)))
    }
}

impl Feed for Lazy {
    fn next(&mut self) -> Result<Option<Bytes>> {
        if let Self::Not(_) = self
            && let Self::Not(make) = std::mem::replace(self, Self::Failed)
        {
            *self = Self::Made(make()?);
        }
        match self {
            Self::Made(feed) => feed.next(),
            _ => Ok(None),
        }
    }
}

/// A feed behind a first piece.
struct After {
    head: Option<Bytes>,
    feed: BoxedFeed,
}

impl Feed for After {
    fn next(&mut self) -> Result<Option<Bytes>> {
        match self.head.take() {
            Some(head) => Ok(Some(head)),
            None => self.feed.next(),
        }
    }
}

/// What comes behind so many bytes.
struct Behind {
    feed: BoxedFeed,
    left: u64,
}

impl Feed for Behind {
    fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let Some(mut piece) = self.feed.next()? else { return Ok(None) };
            let skip = piece.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
            piece.advance(skip);
            self.left -= skip as u64;
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
    }
}

/// The file in the cluster, read ahead by a task once it is known from where on.
struct Cluster {
    begin: oneshot::Sender<u64>,
    pieces: Pieces,
}

impl Cluster {
    fn of(reader: FileReader, progress: Arc<Progress>) -> (Self, JoinHandle<()>) {
        let (begin, begins) = oneshot::channel();
        let (sender, receiver) = mpsc::channel(PIECES);
        // It ends when the computing thread drops its end.
        let reading = tokio::spawn(async move {
            if let Ok(position) = begins.await {
                read(reader, position, sender).await;
            }
        });
        (Self { begin, pieces: Pieces { receiver, progress } }, reading)
    }

    fn from(self, position: u64) -> Pieces {
        // Fails only if the task was stopped: then no piece comes.
        let _ = self.begin.send(position);
        self.pieces
    }
}

async fn read(mut reader: FileReader, position: u64, pieces: mpsc::Sender<Piece>) {
    reader.seek(position);
    loop {
        let piece = match reader.next_chunk().await {
            Ok(Some(piece)) => Ok(piece),
            Ok(None) => return,
            Err(error) => Err(error),
        };
        let failed = piece.is_err();
        if pieces.send(piece).await.is_err() || failed {
            return;
        }
    }
}

struct Pieces {
    receiver: mpsc::Receiver<Piece>,
    progress: Arc<Progress>,
}

impl Feed for Pieces {
    fn next(&mut self) -> Result<Option<Bytes>> {
        let piece = self.receiver.blocking_recv().transpose()?;
        if let Some(piece) = &piece {
            self.progress.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        Ok(piece)
    }
}

/// For records that are generated.
pub struct Nothing;

impl Feed for Nothing {
    fn next(&mut self) -> Result<Option<Bytes>> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::super::kept::{
        self,
        tests::{content, file, folder, keep},
    };
    use super::*;
    use crate::mapreduce::testing;

    fn all(mut feed: impl Feed) -> Vec<u8> {
        let mut out = Vec::new();
        while let Some(piece) = feed.next().unwrap() {
            out.extend_from_slice(&piece);
        }
        out
    }

    /// Content of which the first part is kept, damaged at `damage`, read from `start` on; the rest comes from elsewhere.
    fn mended(kept_bytes: usize, damage: Option<u64>, start: u64) -> (Vec<u8>, u64) {
        let dir = tempfile::tempdir().unwrap();
        let kept = folder(dir.path(), "1", 1 << 30);
        let (about, whole) = (file(5, 500_000), content(500_000));
        keep(&kept, &about, 0, &whole[..kept_bytes], false);
        if let Some(at) = damage {
            kept::tests::damage(&kept, at);
        }
        let rest: Rest = Box::new(|position| {
            let feed = testing::Pieces::of(&content(500_000), 30_000);
            Box::new(Behind { feed: Box::new(feed), left: position })
        });
        let progress = Arc::new(Progress::default());
        let state = State::Kept(kept.find(&about, false, start).unwrap(), rest);
        let got = all(Content { state, progress: Arc::clone(&progress) });
        assert!(got == whole[start as usize..], "{kept_bytes} {damage:?} {start}");
        assert_eq!(kept.find(&about, false, 0).is_some(), damage.is_none(), "what is damaged goes");
        (got, progress.kept.load(Ordering::Relaxed))
    }

    #[test]
    fn what_is_not_kept_or_is_damaged_comes_from_the_cluster() {
        for start in [0, 99_999, 150_000] {
            assert_eq!(mended(500_000, None, start).1, 500_000 - start, "all of it was kept");
            assert_eq!(mended(300_000, None, start).1, 300_000 - start);
        }
        assert_eq!(mended(500_000, Some(250_000), 0).1, 200_000, "two pieces were well");
        assert_eq!(mended(500_000, Some(250_000), 220_000).1, 0);
    }
}
