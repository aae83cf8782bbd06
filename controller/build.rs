//! Generates the gRPC stubs; the messages themselves are those of `policy::wire`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../policy/proto/bulkhead.proto");
    let messages = protox::compile(["bulkhead.proto"], ["../policy/proto"])?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_server(true)
        .extern_path(".bulkhead.v1", "::policy::wire")
        .compile_fds(messages)?;
    Ok(())
}
