//! Compiles the wire messages; the .proto is read in pure Rust, so no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/bulkhead.proto");
    let messages = protox::compile(["bulkhead.proto"], ["proto"])?;
    prost_build::Config::new().compile_fds(messages)?;
    Ok(())
}
