//! The thread that compresses and writes images.

use std::sync::Arc;

use cairn_common::Env;
use cairn_common::durable::Fs;
use cairn_common::work::OwnerHandle;
use tokio::sync::{mpsc, oneshot};

use super::format::ImageHeader;
use super::write::{ImageWriter, Written};
use crate::journal::{LogError, MetaDir};

/// Groups of pages that wait to be written; when they are used up, slices of the checkpoint wait, never the owner.
const WAITING_GROUPS: usize = 8;

/// What the thread is asked to do.
enum Request {
    Begin(ImageJob),
    Pages(Vec<Vec<u8>>),
    Finish(oneshot::Sender<Result<Written, LogError>>),
    Abort,
}

/// One image to write.
pub struct ImageJob {
    /// What it says of itself.
    pub header: ImageHeader,
    /// Where to.
    pub dirs: Vec<Arc<MetaDir>>,
    /// zstd level.
    pub level: i32,
}

/// Handle of the thread.
pub struct Imager {
    requests: mpsc::Sender<Request>,
    thread: OwnerHandle,
}

/// Room for one more message to the thread.
pub struct PageRoom<'a>(mpsc::Permit<'a, Request>);

impl PageRoom<'_> {
    /// Hands over pages.
    pub fn pages(self, pages: Vec<Vec<u8>>) {
        self.0.send(Request::Pages(pages));
    }

    /// Ends the image; the result comes when it is in force (or not).
    pub fn finish(self) -> oneshot::Receiver<Result<Written, LogError>> {
        let (reply, result) = oneshot::channel();
        self.0.send(Request::Finish(reply));
        result
    }

    /// Starts an image; errors are told by [`Self::finish`].
    pub fn begin(self, job: ImageJob) {
        self.0.send(Request::Begin(job));
    }

    /// Gives the image up.
    pub fn abort(self) {
        self.0.send(Request::Abort);
    }
}

impl Imager {
    /// Starts the thread.
    pub fn start(env: &Env) -> std::io::Result<Self> {
        let (requests, inbox) = mpsc::channel(WAITING_GROUPS);
        let fs = Arc::clone(&env.fs);
        let thread = env.work.owner("nn-image", move || run(fs, inbox))?;
        Ok(Self { requests, thread })
    }

    /// Waits for room; `None` if the thread is gone.
    pub async fn room(&self) -> Option<PageRoom<'_>> {
        self.requests.reserve().await.ok().map(PageRoom)
    }

    /// Ends the thread; an image that is not finished is given up.
    pub async fn close(self) {
        drop(self.requests);
        self.thread.join().await;
    }
}

async fn run(fs: Arc<dyn Fs>, mut inbox: mpsc::Receiver<Request>) {
    let mut current: Option<Result<ImageWriter, LogError>> = None;
    while let Some(request) = inbox.recv().await {
        match request {
            Request::Begin(job) => {
                give_up(current.take());
                current = Some(ImageWriter::create(Arc::clone(&fs), &job.dirs, job.header, job.level));
            }
            Request::Pages(pages) => current = current.map(|writer| add(writer, &pages)),
            Request::Finish(reply) => {
                let none = || {
                    Err(LogError::Io {
                        doing: "finish",
                        path: "image".into(),
                        source: std::io::Error::other("it was given up"),
                    })
                };
                let result = current.take().unwrap_or_else(none).and_then(ImageWriter::finish);
                // The owner may have ended meanwhile; the image is in force all the same.
                let _ = reply.send(result);
            }
            Request::Abort => give_up(current.take()),
        }
    }
    give_up(current);
}

/// After the first failure the rest of the pages is dropped; the failure is told at the end.
fn add(writer: Result<ImageWriter, LogError>, pages: &[Vec<u8>]) -> Result<ImageWriter, LogError> {
    let mut writer = writer?;
    for page in pages {
        if let Err(error) = writer.page(page) {
            writer.abort();
            return Err(error);
        }
    }
    Ok(writer)
}

fn give_up(writer: Option<Result<ImageWriter, LogError>>) {
    if let Some(Ok(writer)) = writer {
        writer.abort();
    }
}
