//! The crate's floors: what may use what, and where unsafe code is allowed. Read from the sources.
//!
//! ```text
//! 0  error  dtype  format  shape  activation     use nothing
//! 1  simd  device                        use 0         know no operation
//! 2  view  weights  quantized  layout  epilogue  use 0-1
//! 3  ops/<op>, ops/<op>/{cpu,cuda}       use 0-2       never another operation
//! 3  interop                             uses 0-2      other crates' types as elements and views
//! 4  moe                                 uses 3        the only composition
//! ```
//!
//! One edge points upwards: `device/` names no view, but `view` adds the view-making methods of `Buffer` and
//! `Workspace`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Modules that may hold unsafe code, each for the reason it states beside its `allow`.
const UNSAFE_ALLOWED: &[&str] = &[
    "simd",
    "device",
    "view",
    "layout/expert_rows",
    "layout/expert_weights",
    "layout/kv",
    "layout/rope",
    "layout/tokens",
    "interop",
    "ops/*/cuda",
];

fn sources() -> Vec<(String, String)> {
    let root = dropless_kit::goldens::root().join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    let name = |path: &Path| path.strip_prefix(&root).unwrap().with_extension("").to_string_lossy().replace('\\', "/");
    files.iter().map(|path| (name(path), std::fs::read_to_string(path).unwrap())).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// The floor of a module path such as `ops/router/cpu`.
fn floor(module: &str) -> u32 {
    match module.split('/').next().unwrap() {
        "error" | "dtype" | "format" | "shape" | "activation" | "splitmix" => 0,
        "simd" | "device" => 1,
        "view" | "weights" | "quantized" | "layout" | "epilogue" => 2,
        "ops" | "interop" => 3,
        "moe" | "lib" => 4,
        other => panic!("src/{other} stands on no floor: give it one here"),
    }
}

/// Every `crate::a::b` of a file, as `a/b`.
fn uses(text: &str) -> BTreeSet<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let paths = code.flat_map(|line| line.split("crate::").skip(1).map(str::to_owned).collect::<Vec<_>>());
    paths
        .map(|path| {
            let path: String = path.chars().take_while(|c| c.is_alphanumeric() || *c == '_' || *c == ':').collect();
            path.split("::").filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/")
        })
        .filter(|path| path.chars().next().is_some_and(char::is_lowercase))
        .collect()
}

#[test]
fn no_edge_points_upwards() {
    let (mut checked, mut wrong) = (0, Vec::new());
    for (module, text) in sources().iter().filter(|(module, _)| module != "lib") {
        for used in uses(text) {
            checked += 1;
            if floor(&used) > floor(module) {
                wrong.push(format!("src/{module}.rs (floor {}) uses {used} (floor {})", floor(module), floor(&used)));
            }
        }
    }
    assert!(checked > 30, "only {checked} edges were found: the reader is broken");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_operation_uses_another() {
    for (module, text) in sources() {
        let Some(op) = module.strip_prefix("ops/").map(|rest| rest.split('/').next().unwrap()) else { continue };
        for used in uses(&text) {
            let other = used.strip_prefix("ops/").map(|rest| rest.split('/').next().unwrap());
            assert!(other.is_none_or(|other| other == op), "src/{module}.rs uses the operation {other:?}");
        }
    }
}

#[test]
fn unsafe_code_stays_where_it_is_allowed() {
    for (module, text) in sources() {
        let allowed = UNSAFE_ALLOWED.iter().any(|pattern| match pattern.split_once("/*/") {
            Some((first, last)) => module.starts_with(first) && (module.ends_with(last) || module.contains(&format!("/{last}/"))),
            None => module == *pattern || module.starts_with(&format!("{pattern}/")),
        });
        let mentions = text.contains("#![allow(unsafe_code)]") || text.contains("#[allow(unsafe_code)]");
        assert!(allowed || !mentions, "src/{module}.rs allows unsafe code, but is not on the list");
    }
    assert!(sources().iter().any(|(module, text)| module == "lib" && text.contains("#![deny(") && text.contains("unsafe_code")));
}
#[test]
fn every_operation_has_its_files() {
    let root = dropless_kit::goldens::root();
    for (module, _) in sources() {
        let Some(op) = module.strip_prefix("ops/").filter(|rest| !rest.contains('/')) else { continue };
        for file in [
            format!("src/ops/{op}/cpu.rs"),
            format!("tests/kit/src/oracle/{op}.rs"),
            format!("tests/ops/{op}.rs"),
            format!("benches/{op}.rs"),
        ] {
            assert!(root.join(&file).is_file(), "{op} has no {file}");
        }
    }
}
