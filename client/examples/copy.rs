//! Copies a local file into a cluster, reads it back, and shows where its blocks lie.
//!
//! ```text
//! cairn local &
//! cargo run --example copy -- 127.0.0.1:8020 README.md /copy-of-readme
//! ```

use std::process::ExitCode;

use cairn_client::fs::{ClientSettings, CreateOptions, Error, ErrorCode, FileSystem, Result};
use cairn_common::Env;
use tokio::io::AsyncReadExt;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [namenode, local, path] = &arguments[..] else {
        eprintln!("usage: copy NAMENODE LOCAL PATH");
        return ExitCode::from(2);
    };
    match copy(namenode, local, path).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("copy: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn copy(namenode: &str, local: &str, path: &str) -> Result<()> {
    let fs = FileSystem::connect(Env::system(), ClientSettings::at(namenode)).await?;

    let mut source =
        tokio::fs::File::open(local).await.map_err(|error| Error::io(format!("opening {local}"), &error))?;
    let mut out = fs.create(path, CreateOptions { overwrite: true, ..Default::default() }).await?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = source.read(&mut buffer).await.map_err(|error| Error::io(format!("reading {local}"), &error))?;
        if count == 0 {
            break;
        }
        out.write(&buffer[..count]).await?;
    }
    // From here on the file is whole, durable and visible.
    let status = out.close().await?;
    println!("{}: {} bytes, {} replicas", status.path, status.length, status.replication);

    for located in fs.block_locations(path, 0, 0).await? {
        let hosts: Vec<_> =
            located.replicas.iter().map(|replica| format!("{}{}", replica.host, replica.rack)).collect();
        println!("  at {}: {} bytes on {}", located.offset, located.length, hosts.join(", "));
    }

    let mut input = fs.open(path).await?;
    let mut length = 0;
    while let Some(chunk) = input.next_chunk().await? {
        length += chunk.len() as u64;
    }
    if length == status.length {
        println!("read back and verified: {length} bytes");
        return Ok(());
    }
    Err(Error::new(ErrorCode::Corrupt, format!("{path}: {length} bytes came back of {}", status.length)))
}
