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
        .blocklist_type("u?int(32|64)_t|(In|Out)(U32|F32)?")
        .disable_header_comment()
        .raw_line("//! The parameter structs of the kernels, generated from `cuda/common/params.h`; do not edit. To regenerate:")
        .raw_line("//! `LIBCLANG_PATH=... cargo check --features regenerate-bindings`")
        .raw_line("#![allow(missing_docs)]")
        .raw_line("")
        .raw_line("// Device addresses, by what lies there.")
        .raw_line(["In", "InU32", "InF32", "Out", "OutU32", "OutF32"].map(|name| format!("pub(crate) type {name} = u64;")).join("\n"))
        .default_visibility(bindgen::FieldVisibilityKind::PublicCrate)
        .rustfmt_configuration_file(Some(std::env::current_dir().unwrap_or_default().join("rustfmt.toml")))
        .parse_callbacks(Box::new(AddressesAreCopy))
        .derive_debug(false)
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
