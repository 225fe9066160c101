//! The parameter structs as the kernels, the C++ compiler and Rust see them.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use dropless_kit::goldens::root;

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
            let source = read(&format!("cuda/{}.cu", words[1].trim_end_matches(".sm_90a.ptx")));
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
