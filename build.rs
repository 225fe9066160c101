//! Nothing, unless a feature asks for a tool: libclang for `regenerate-bindings`, a CUDA compiler for `build-kernels`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "regenerate-bindings")]
    regenerate_bindings();
    #[cfg(feature = "build-kernels")]
    build_kernels();
}

/// Writes `src/device/params.rs` from `cuda/common/params.h`, with the compiler's view of every size and offset as assertions.
#[cfg(feature = "regenerate-bindings")]
fn regenerate_bindings() {
    let header = "cuda/common/params.h";
    println!("cargo::rerun-if-changed={header}");
    let bindings = bindgen::Builder::default()
        .header(header)
        .clang_args(["-x", "c++", "-std=c++17", "--target=x86_64-linux-gnu"])
        .allowlist_file(format!(".*{header}"))
        .blocklist_type("u?int(32|64)_t|(In|Out)(U32|F32)?|TensorMap")
        .disable_header_comment()
        .raw_line("//! The parameter structs of the kernels, generated from `cuda/common/params.h`; do not edit. To regenerate:")
        .raw_line("//! `LIBCLANG_PATH=... cargo check --features regenerate-bindings`")
        .raw_line("#![allow(missing_docs)]")
        .raw_line("")
        .raw_line("use super::driver::TensorMap;")
        .raw_line("")
        .raw_line("// Device addresses, by what lies there.")
        .raw_line(["In", "InU32", "InF32", "Out", "OutU32", "OutF32"].map(|name| format!("pub(crate) type {name} = u64;")).join("\n"))
        .default_visibility(bindgen::FieldVisibilityKind::PublicCrate)
        .rustfmt_configuration_file(Some(std::env::current_dir().unwrap_or_default().join("rustfmt.toml")))
        .parse_callbacks(Box::new(AddressesAreCopy))
        .derive_debug(true) // by which `tests/params.rs` knows the fields
        .generate()
        .unwrap_or_else(|error| panic!("bindgen over {header}: {error}"));
    bindings.write_to_file("src/device/params.rs").unwrap_or_else(|error| panic!("src/device/params.rs: {error}"));
}

/// Addresses are declared above, out of bindgen's sight: they may be copied.
#[cfg(feature = "regenerate-bindings")]
#[derive(Debug)]
struct AddressesAreCopy;

#[cfg(feature = "regenerate-bindings")]
impl bindgen::callbacks::ParseCallbacks for AddressesAreCopy {
    fn blocklisted_type_implements_trait(
        &self,
        _: &str,
        _: bindgen::callbacks::DeriveTrait,
    ) -> Option<bindgen::callbacks::ImplementsTrait> {
        Some(bindgen::callbacks::ImplementsTrait::Yes)
    }
}

/// Compiles every kernel with the caller's nvcc into `OUT_DIR`, from where `src/device/image.rs` embeds it.
#[cfg(feature = "build-kernels")]
fn build_kernels() {
    use std::path::PathBuf;
    use std::process::Command;

    for variable in ["DROPLESS_NVCC", "CUDA_HOME", "CUDA_PATH", "DOCS_RS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed=cuda");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let toolkit = || variable("CUDA_HOME").or_else(|| variable("CUDA_PATH")).map(|home| home.join("bin/nvcc")).filter(|nvcc| nvcc.exists());
    let nvcc = variable("DROPLESS_NVCC").or_else(toolkit).unwrap_or_else(|| PathBuf::from("nvcc"));
    let kernels = std::fs::read_dir("cuda").unwrap_or_else(|error| panic!("cuda/: {error}"));
    for source in kernels.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.extension().is_some_and(|e| e == "cu")) {
        let image = out.join(source.with_extension("sm_90a.ptx").file_name().unwrap_or_default());
        if variable("DOCS_RS").is_some() {
            std::fs::write(image, "").unwrap_or_else(|error| panic!("{error}")); // documentation needs no kernels
            continue;
        }
        let mut command = Command::new(&nvcc);
        command.args(["-ptx", "-arch=compute_90a", "-std=c++17", "-lineinfo", "-Icuda", "-o"]).arg(image).arg(&source);
        let run = command.output().unwrap_or_else(|error| {
            panic!("build-kernels needs nvcc: {} cannot be run ({error}); set DROPLESS_NVCC, CUDA_HOME or CUDA_PATH", nvcc.display())
        });
        assert!(run.status.success(), "{}\n{}", source.display(), String::from_utf8_lossy(&run.stderr));
    }
}
