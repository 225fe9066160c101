//! The parameter structs as the kernels, the C++ compiler and Rust see them.

#![cfg(feature = "cuda")]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt::Debug;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;

use dropless::device::driver::{Driver, Launch, hardware::Hardware};
use dropless_kit::emulated::{Emulated, Options};
use dropless_kit::goldens::root;

mod driver {
    pub use dropless::device::driver::TensorMap;
}

/// The structs as the library has them.
#[allow(dead_code)] // tests read layouts, the library fields
#[path = "../src/device/params.rs"]
#[rustfmt::skip]
mod params;

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Sizes and offsets that `src/device/params.rs` asserts when it is compiled: `("GluParams", None)` is a size.
fn asserted() -> BTreeMap<(String, Option<String>), usize> {
    let text = read("src/device/params.rs");
    let number = |line: &str| line.rsplit_once(" - ").and_then(|(_, end)| end.split("usize").next()?.parse().ok());
    let mut found = BTreeMap::new();
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("[\"Size of ") {
            found.insert((rest.split('"').next().unwrap().to_owned(), None), number(line).unwrap());
        } else if let Some(rest) = line.strip_prefix("[\"Offset of field: ") {
            let (name, field) = rest.split('"').next().unwrap().split_once("::").unwrap();
            found.insert((name.to_owned(), Some(field.to_owned())), number(line).unwrap());
        }
    }
    found
}

/// The structs of `params.h` and their fields, read as text.
fn declared() -> Vec<(String, Vec<String>)> {
    let mut structs: Vec<(String, Vec<String>)> = Vec::new();
    for line in read("cuda/common/params.h").lines() {
        if let Some(name) = line.strip_prefix("struct ").and_then(|rest| rest.strip_suffix(" {")) {
            structs.push((name.to_owned(), Vec::new()));
        } else if let (Some((declaration, _)), Some(last)) = (line.split_once(';'), structs.last_mut())
            && line.starts_with("    ")
        {
            last.1.push(declaration.rsplit(' ').next().unwrap().split('[').next().unwrap().to_owned());
        }
    }
    structs
}

#[test]
fn every_field_is_on_both_sides() {
    let (asserted, declared) = (asserted(), declared());
    assert!(declared.len() >= 12, "{declared:?}");
    let fields: usize = declared.iter().map(|(_, fields)| fields.len()).sum();
    assert_eq!(asserted.len(), fields + declared.len());
    for (name, fields) in declared {
        assert!(asserted.contains_key(&(name.clone(), None)), "{name}: regenerate src/device/params.rs");
        // In the order of declaration, without padding.
        let mut end = 0;
        for field in fields {
            let at = asserted.get(&(name.clone(), Some(field.clone())));
            let at = *at.unwrap_or_else(|| panic!("{name}::{field}: regenerate src/device/params.rs"));
            assert!(at >= end, "{name}::{field} lies at {at}");
            end = at + 4;
        }
        assert_eq!(asserted[&(name.clone(), None)] % 8, 0, "{name}");
    }
}

/// The image's view: each entry takes as many bytes as a struct of its source has.
#[test]
fn entries_take_a_struct_of_their_source() {
    let (asserted, manifest) = (asserted(), read("ptx/MANIFEST"));
    let mut sizes = Vec::new();
    for line in manifest.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        if words[0] == "image" {
            let source = read(&format!("cuda/{}.cu", words[1].trim_end_matches(".sm_90a")));
            let named =
                |(name, field): &(String, Option<String>)| field.is_none() && source.contains(&format!("__grid_constant__ {name} p"));
            sizes = asserted.iter().filter(|(key, _)| named(key)).map(|(_, size)| *size).collect();
            assert!(!sizes.is_empty(), "{line}");
        } else if words[0] == "entry" {
            assert!(sizes.contains(&words[3].parse().unwrap()), "{line}: not one of {sizes:?}");
        }
    }
}

/// The C++ compiler's view, where there is one.
#[test]
fn a_host_compiler_agrees() {
    let mut program = String::from("#include <stddef.h>\n#include \"params.h\"\n");
    for ((name, field), value) in asserted() {
        program += &match field {
            Some(field) => format!("static_assert(offsetof({name}, {field}) == {value}, \"{name}::{field}\");\n"),
            None => format!("static_assert(sizeof({name}) == {value}, \"{name}\");\n"),
        };
    }
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let mut command = Command::new(&compiler);
    command.args(["-x", "c++", "-std=c++17", "-fsyntax-only", "-"]).arg(format!("-I{}", root().join("cuda/common").display()));
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let Ok(mut child) = spawned else {
        let _ = writeln!(std::io::stderr(), "NOT COMPARED with a C++ compiler: {compiler} cannot be run");
        return;
    };
    child.stdin.take().unwrap().write_all(program.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What a kernel of `params/echo.sm_90a.ptx` takes: a struct, and where its fields go.
#[allow(dead_code)] // never read by name: its bytes are a kernel's parameters
#[repr(C)]
struct Echo<P> {
    params: P,
    out: u64,
}

/// A driver on which an image was loaded.
struct Machine {
    driver: Arc<dyn Driver>,
    stream: u64,
    image: u64,
}

/// The emulated GPU, and the GPU where there is one.
fn machines() -> Vec<Machine> {
    let image = read("tests/params/echo.sm_90a.ptx");
    let header = read("cuda/common/params.h");
    let hash = header.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    assert!(image.starts_with(&format!("// of cuda/common/params.h {hash:016x};")), "params.h has changed: run cuda/build.py");
    let emulated = || Arc::new(Emulated::new(Options::default())) as Arc<dyn Driver>;
    let emulated = (!dropless_kit::device::hardware_only()).then(emulated);
    let hardware = dropless_kit::device::hardware().map(|_| Hardware::shared().unwrap() as Arc<dyn Driver>);
    let text = [image.as_bytes(), b"\0"].concat();
    let open = |driver: Arc<dyn Driver>| {
        let (stream, image) = (driver.create_stream(0).unwrap(), driver.load_image(0, &text).unwrap());
        Machine { driver, stream, image }
    };
    [emulated, hardware].into_iter().flatten().map(open).collect()
}

/// Sends a struct with a different value in every field through a kernel that writes each field back, and compares with what Rust
/// reads there. Gives the number of fields.
fn echo<P: Copy + Debug>(machine: &Machine) -> usize {
    let name = std::any::type_name::<P>().rsplit("::").next().unwrap();
    // Each half of each word is a number of its own that is an ordinary f32, too.
    let bytes: Vec<u8> = (0..size_of::<P>() as u32 / 4).flat_map(|i| (0x4000_0000 + i).to_ne_bytes()).collect();
    // SAFETY: as many bytes as the struct has, all fields of which are numbers.
    let params: P = unsafe { bytes.as_ptr().cast::<P>().read_unaligned() };
    let shown = format!("{params:?}");
    let words = shown.split([' ', ',', '{', '}', '(', ')', '[', ']']).filter(|word| !word.ends_with(':'));
    let bits = |word: &str| match word.parse::<u64>() {
        Ok(bits) => Some(bits),
        Err(_) => Some(word.parse::<f32>().ok()?.to_bits().into()),
    };
    let want: Vec<u64> = std::iter::once(size_of::<P>() as u64).chain(words.filter_map(bits)).collect();

    let Machine { driver, stream, image } = machine;
    let out = driver.alloc(*stream, 8 * want.len()).unwrap();
    let mut arguments = vec![0u8; size_of::<Echo<P>>()];
    arguments[..bytes.len()].copy_from_slice(&bytes);
    arguments[std::mem::offset_of!(Echo<P>, out)..][..8].copy_from_slice(&out.to_ne_bytes());
    let function = driver.function(*image, &CString::new(format!("echo_{name}")).unwrap()).unwrap();
    let one = [1, 1, 1];
    let launch = Launch {
        function,
        grid: one,
        block: one,
        cluster: one,
        shared_bytes: 0,
        is_programmatic: false,
        params: &arguments,
        offsets: &[0],
    };
    let mut got = vec![0u64; want.len()];
    // SAFETY: the kernel's own arguments; it writes as many words as the struct has fields, and one more; they are read once it is done.
    unsafe {
        driver.launch(*stream, &launch).unwrap();
        driver.copy_to_host(*stream, got.as_mut_ptr().cast(), out, 8 * got.len()).unwrap();
    }
    driver.free(*stream, out).unwrap();
    assert_eq!(got, want, "{shown}");
    want.len() - 1
}

/// The kernel's view, by execution: every field of every struct arrives where it belongs.
#[test]
fn every_field_arrives() {
    use params::*;
    macro_rules! each {
        ($machine:expr, $($name:ident)*) => { [$((stringify!($name), echo::<$name>($machine))),*] };
    }
    let declared: BTreeMap<String, Vec<String>> = declared().into_iter().collect();
    for machine in machines() {
        let echoed = each!(
            &machine,
            EmbeddingParams NormParams GatherParams CombineParams BiasParams EpilogueParams GluParams InTurnParams ArgmaxParams TopPParams UniformParams LogitsParams ChooseParams IndexParams
            PageParams PoolParams HeadsParams RopeParams AttentionParams TiledAttentionParams ProductParams GivenParams RouteParams CountParams AxisParams SddParams DsdParams
            ArrangeParams TiledProductParams BlockProductParams QuantizeParams WeightScaleParams Fp8ProductParams
            QuantizedMatrixParams QuantizedEmbeddingParams PlainQuantizedParams RepackParams QuantizedProductParams
        );
        assert_eq!(echoed.len(), declared.len(), "a struct of params.h is missing above");
        for (name, fields) in echoed {
            assert!(fields >= declared[name].len(), "{name}: {fields} fields"); // and more where structs or arrays are among them
        }
    }
}
