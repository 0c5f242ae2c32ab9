//! Compiles the message definitions with `protox`, so no system `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "proto/cairn/v1/common.proto",
        "proto/cairn/v1/handshake.proto",
        "proto/cairn/v1/namenode.proto",
        "proto/cairn/v1/cluster.proto",
        "proto/cairn/v1/data.proto",
        "proto/cairn/v1/task.proto",
        "proto/cairn/v1/job.proto",
        "proto/cairn/v1/edit.proto",
        "proto/hadoop/rpc.proto",
        "proto/hadoop/hdfs.proto",
        "proto/hadoop/acl.proto",
        "proto/hadoop/namenode.proto",
        "proto/hadoop/datatransfer.proto",
        "proto/hadoop/datanode.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    let grpc = std::env::var_os("CARGO_FEATURE_GRPC").is_some();
    tonic_prost_build::configure().build_client(grpc).build_server(grpc).bytes(".").compile_fds(descriptors)?;
    Ok(())
}
