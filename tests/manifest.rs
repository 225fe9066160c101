//! The images that ship are the images of these sources: read from `ptx/MANIFEST`, without a compiler.

use std::collections::BTreeSet;
use std::path::Path;

use dropless_kit::goldens::root;

/// One line of the manifest behind its first word: a name, and values by their names.
struct Line<'a> {
    name: &'a str,
    fields: Vec<(&'a str, &'a str)>,
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Line<'a> {
        let words: Vec<&str> = line.split(' ').collect();
        let fields = words[2..].chunks(2).map(|pair| (pair[0], pair.get(1).copied().unwrap_or(""))).collect();
        Line { name: words[1], fields }
    }

    fn field(&self, name: &str) -> &'a str {
        self.fields.iter().find(|field| field.0 == name).unwrap_or_else(|| panic!("{} has no `{name}`", self.name)).1
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn names(folder: &str, suffix: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(root().join(folder)).unwrap_or_else(|error| panic!("{folder}: {error}"));
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter_map(|name| name.strip_suffix(suffix).map(str::to_owned)).collect()
}

/// FNV-1a, 64 bits, as `cuda/build.py` computes it.
fn fnv(texts: &[&[u8]]) -> String {
    let bytes = texts.iter().flat_map(|text| text.iter());
    format!("{:016x}", bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)))
}

#[test]
fn images_are_those_of_the_sources() {
    let manifest = read("ptx/MANIFEST");
    let images: Vec<Line<'_>> = manifest.lines().filter(|line| line.starts_with("image ")).map(Line::parse).collect();
    let listed: BTreeSet<String> = images.iter().map(|image| image.name.replace(".sm_90a", "")).collect();
    assert_eq!(listed, names("cuda", ".cu"), "ptx/MANIFEST and cuda/*.cu: run cuda/build.py");
    assert_eq!(listed, names("ptx", ".sm_90a.ptx"), "ptx/MANIFEST and ptx/*.ptx: run cuda/build.py");
    assert_eq!(listed, names("ptx", ".sm_90a.cubin"), "ptx/MANIFEST and ptx/*.cubin: run cuda/build.py");

    let headers: BTreeSet<String> = ["cuda/common", "cuda/common/ptx"]
        .iter()
        .flat_map(|folder| names(folder, "h").into_iter().map(move |name| format!("{folder}/{name}h")))
        .collect();
    let common: Vec<String> = headers.iter().map(|path| read(path)).collect();
    for image in &images {
        let stem = image.name.strip_suffix(".sm_90a").unwrap();
        let source = read(&format!("cuda/{stem}.cu"));
        let sources: Vec<&[u8]> = std::iter::once(&source).chain(&common).map(|text| text.as_bytes()).collect();
        assert_eq!(fnv(&sources), image.field("sources"), "ptx/{} is older than its sources: run cuda/build.py", image.name);
        let ptx = read(&format!("ptx/{}.ptx", image.name));
        assert_eq!(fnv(&[ptx.as_bytes()]), image.field("ptx"), "ptx/{}.ptx was edited by hand", image.name);
        let cubin = std::fs::read(root().join(format!("ptx/{}.cubin", image.name))).unwrap();
        assert!(cubin.starts_with(b"\x7fELF"), "ptx/{}.cubin is no cubin", image.name);
        assert_eq!(fnv(&[&cubin]), image.field("cubin"), "ptx/{}.cubin is not the code of that PTX: run cuda/build.py", image.name);

        // What the oldest driver served can load, with file names that are nobody's.
        let isa: Vec<u32> = image.field("isa").split('.').map(|part| part.parse().unwrap()).collect();
        assert!(ptx.starts_with(&format!(".version {}\n", image.field("isa"))) && isa <= vec![8, 4], "{}: PTX ISA {isa:?}", image.name);
        assert!(ptx.contains("\n.target sm_90a\n") && ptx.ends_with("}\n") && !ptx.contains('\0'));
        for line in ptx.lines().filter(|line| line.trim_start().starts_with(".file")) {
            let file = line.split('"').nth(1).unwrap();
            assert!(Path::new(file).is_relative() && root().join(file).is_file(), "{}: {line}", image.name);
        }
    }
}

/// The tables of the ops list every entry of every image, in the image that they name, and none that is not there; what they say of shared memory
/// and of threads fits what the compilers said.
#[test]
#[cfg(feature = "cuda")]
fn tables_list_every_kernel() {
    let manifest = read("ptx/MANIFEST");
    let mut image = "";
    let mut shipped = BTreeSet::new();
    for line in manifest.lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["image", name, ..] => image = name.trim_end_matches(".sm_90a"),
            ["entry", name, ..] => assert!(shipped.insert((image, name))),
            _ => {}
        }
    }
    let kernels = dropless::ops::kernels();
    let listed: BTreeSet<_> = kernels.iter().map(|kernel| (kernel.stem(), kernel.entry)).collect();
    assert_eq!(listed, shipped);
    let lines: Vec<Line<'_>> = manifest.lines().filter(|line| line.starts_with("entry ")).map(Line::parse).collect();
    for kernel in &kernels {
        let line = lines.iter().find(|line| line.name == kernel.entry).unwrap();
        assert_eq!(kernel.arch, (9, 0), "{}", kernel.entry);
        assert!(most(line, "shared") + kernel.shared_bytes <= 227 << 10, "{}", kernel.entry);
        let launched = kernel.threads.max(32).next_multiple_of(32); // 0: by the shape
        assert!(most(line, "registers") * launched <= 65536, "{}: {} threads", kernel.entry, kernel.threads);
    }
}

/// Where a figure of the manifest differs between the two assemblers, the greater one.
fn most(entry: &Line<'_>, figure: &str) -> u32 {
    let number = |text: &str| text.parse::<u32>().unwrap_or_else(|_| panic!("{}: {figure} {text}", entry.name));
    entry.field(figure).split('/').map(number).max().unwrap()
}

/// By both assemblers: no spills, no stack, no local memory; and no loop that waits for the whole GPU's memory or flushes the L1 cache.
#[test]
fn no_kernel_has_what_costs_dearly() {
    let manifest = read("ptx/MANIFEST");
    assert!(manifest.contains("\nassemblers 12.4.131 13.0.88\n"), "the oldest and the newest assembler that are promised");
    let entries: Vec<Line<'_>> = manifest.lines().filter(|line| line.starts_with("entry ")).map(Line::parse).collect();
    assert!(entries.len() > 40, "only {} entries", entries.len());
    for entry in &entries {
        for figure in ["stack", "spills", "local", "membar_in_loops", "flush_in_loops"] {
            assert_eq!(entry.field(figure), "0", "{}: {figure}", entry.name);
        }
        let within = most(entry, "registers") <= 255 && most(entry, "shared") <= 48 << 10 && most(entry, "params") <= 4096;
        assert!(within, "{}", entry.name);
    }
    let distinct: BTreeSet<&str> = entries.iter().map(|entry| entry.name).collect();
    assert_eq!(distinct.len(), entries.len(), "an entry point in two images");
}

/// Every kernel lets the next one start, and waits for the one in front of it before it touches memory: so that launches may overlap.
#[test]
fn kernels_wait_for_the_launch_before() {
    let manifest = read("ptx/MANIFEST");
    let mut count = 0;
    for image in manifest.lines().filter_map(|line| line.strip_prefix("image ")).map(|line| line.split(' ').next().unwrap()) {
        for (entry, text) in entries(&manifest, &read(&format!("ptx/{image}.ptx"))) {
            let at = |what: &str| text.find(what).unwrap_or(text.len());
            let next = at("griddepcontrol.launch_dependents;");
            let wait = at("griddepcontrol.wait;");
            let memory =
                [".global.", "cp.async", "ld.v", "st.v", "\tatom.", " atom.", "\tred.", " red."].iter().map(|what| at(what)).min().unwrap();
            assert!(next < wait && wait < memory && memory < text.len(), "{}: {next}, {wait}, {memory}", entry.name);
            count += 1;
        }
    }
    assert_eq!(count, manifest.lines().filter(|line| line.starts_with("entry ")).count());
}

/// The entries of an image, with the text of each.
fn entries<'a>(manifest: &'a str, ptx: &'a str) -> Vec<(Line<'a>, &'a str)> {
    let lines = manifest.lines().filter(|line| line.starts_with("entry ")).map(Line::parse);
    let text = |name: &str| ptx.split(&format!(".entry {name}(")).nth(1).map(|rest| rest.split(".entry ").next().unwrap());
    lines.filter_map(|entry| text(entry.name).map(|text| (entry, text))).collect()
}

/// What makes the tensor-core kernels fast can be read from their code: products are not serialised, each stage is one batch, operands
/// come by tensor copies, and the registers handed from the producer to the consumers are those there are.
#[test]
fn tensor_cores_are_used_as_meant() {
    let (manifest, ptx) = (read("ptx/MANIFEST"), read("ptx/grouped_gemm.sm_90a.ptx"));
    let tiled = entries(&manifest, &ptx);
    assert_eq!(tiled.len(), 10);
    for (entry, text) in tiled {
        // A stage is four steps of 16 along k, and one wait; in a loop for gathered rows, and in one for others.
        assert_eq!([entry.field("hgmma"), entry.field("depbar")], ["8", "2"], "{}", entry.name);
        // Rows, and boxes of weights for one block or for two.
        let boxes = if entry.name.contains("_nt_") && !entry.name.contains("glu") { 2 } else { 4 };
        let copies = [vec!["2d"], vec!["3d"; boxes], vec!["3d.multicast"; boxes]].concat().join(",");
        assert_eq!(entry.field("tma"), copies, "{}", entry.name);
        assert_registers_handed(&entry, text);
    }
}

/// The same of e4m3: a stage is two halves of its columns of four steps of 32 along k each, and each half is
/// waited for; the scales of its rows come by a copy of their own.
#[test]
fn codes_meet_the_tensor_cores() {
    let (manifest, ptx) = (read("ptx/MANIFEST"), read("ptx/grouped_gemm_fp8.sm_90a.ptx"));
    let tiled = entries(&manifest, &ptx);
    assert_eq!(tiled.len(), 6);
    for (entry, text) in tiled {
        assert_eq!([entry.field("hgmma"), entry.field("depbar")], ["8", "2"], "{}", entry.name);
        let boxes = if entry.name.contains("glu") { 4 } else { 2 };
        let copies = [vec!["2d"; 2], vec!["3d"; boxes], vec!["3d.multicast"; boxes]].concat().join(",");
        assert_eq!(entry.field("tma"), copies, "{}", entry.name);
        assert_registers_handed(&entry, text);
    }
}

/// What the emulator, which knows no scopes, cannot see of blocks that share weights: those of a cluster begin and end together, warps
/// are whole again when they come to the last barrier, and nothing in between waits for the whole cluster's memory.
#[test]
fn clusters_are_synchronised_as_such() {
    // Consumers release a stage in the loop that multiplies, and in one for tiles in which they have no row.
    // For rows of 16 bits there are two loops that multiply: one for gathered rows, and one for others.
    // Consumers await their own block's barrier in the same places. The producer awaits the consumers of all
    // blocks, and so does the warp that loads the scales of e4m3. Consumers, producer and that warp each
    // await the tile's number.
    for (image, releases, awaits) in [("grouped_gemm", 3, 6), ("grouped_gemm_fp8", 2, 7)] {
        synchronised(image, releases, awaits);
    }
}

fn synchronised(image: &str, releases: usize, awaits: usize) {
    let (manifest, ptx) = (read("ptx/MANIFEST"), read(&format!("ptx/{image}.sm_90a.ptx")));
    for (entry, text) in entries(&manifest, &ptx) {
        let code: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.starts_with(".loc") && !line.is_empty()).collect();
        let with = |part: &str| code.iter().filter(|line| line.contains(part)).count();
        // A tile's number is sent to both blocks.
        let (arrivals, numbers) = (with("mbarrier.arrive.shared::cluster.b64"), with("st.async.shared::cluster"));
        assert_eq!([arrivals, numbers, with("[remote]")], [releases, 2, releases + 2], "{}", entry.name);
        assert_eq!([with("mbarrier.try_wait.parity.shared::cta.b64"), with("mbarrier.try_wait")], [awaits; 2], "{}", entry.name);
        assert_eq!([with("barrier.cluster.arrive.release.aligned"), with("barrier.cluster.arrive")], [2, 2], "{}", entry.name);
        assert_eq!([with("barrier.cluster.wait.acquire.aligned"), with("barrier.cluster.wait")], [2, 2], "{}", entry.name);
        let last = code.iter().rposition(|line| line.contains("barrier.cluster.arrive")).unwrap();
        assert!(code[last - 1].starts_with("bar.warp.sync"), "{}: {}", entry.name, code[last - 1]);
    }
}

/// As [`tensor_cores_are_used_as_meant`], of the products of blocks, which load boxes of 64 x 64: one copy for each of a tile in the code
/// for a sparse result, and in that for a dense one; and multiply in a loop for whole stages, and behind it.
#[test]
fn blocks_meet_the_tensor_cores() {
    let (manifest, ptx) = (read("ptx/MANIFEST"), read("ptx/block_sparse.sm_90a.ptx"));
    let tiled = entries(&manifest, &ptx);
    assert_eq!(tiled.len(), 16, "two types, two sizes of blocks, four ways that operands lie");
    for (entry, text) in tiled {
        let boxes = if entry.name.ends_with("_128") { 128 / 64 + 256 / 64 } else { 64 / 64 + 256 / 64 };
        let copies = vec!["2d"; 2 * boxes].join(",");
        assert_eq!([entry.field("hgmma"), entry.field("depbar"), entry.field("tma")], ["8", "2", &copies], "{}", entry.name);
        assert_registers_handed(&entry, text);
    }
}

/// The registers that the producer hands over and the consumers take are those that the block was launched with.
fn assert_registers_handed(entry: &Line<'_>, text: &str) {
    let number = |name: &str| text.split(name).nth(1).unwrap().split([' ', ',', ';']).find_map(|word| word.parse::<u32>().ok()).unwrap();
    let threads = number(".maxntid");
    let handed = 128 * number("setmaxnreg.dec.sync.aligned.u32") + (threads - 128) * number("setmaxnreg.inc.sync.aligned.u32");
    let launched = threads * most(entry, "registers");
    assert!(handed <= launched && launched <= 65_536, "{}: {handed} of {launched} registers", entry.name);
}

/// The same of the kernels for few rows: stages of 128 of k, or of 64 for two products, weights by three-dimensional copies.
#[test]
fn weights_are_streamed() {
    let (manifest, ptx) = (read("ptx/MANIFEST"), read("ptx/grouped_gemm_few.sm_90a.ptx"));
    let few = entries(&manifest, &ptx);
    assert!(few.len() >= 30, "only {} entries", few.len());
    for (entry, text) in few {
        let copies = if entry.name.contains("glu") { "2d,3d,3d" } else { "2d,2d,3d,3d" };
        assert_eq!([entry.field("hgmma"), entry.field("depbar"), entry.field("tma")], ["8", "1", copies], "{}", entry.name);
        assert_eq!(text.matches("L2::cache_hint").count(), 2, "{}", entry.name);
    }
}

/// The same of attention for few query tokens. In the code for 8 rows and in that for 32, a part's keys are
/// four products of 64 keys along the head, each waited for when the next is on its way; the values of 64
/// keys are one batch, in a loop. One fence on each side of the count that blocks share.
#[test]
fn keys_and_values_are_streamed() {
    let (manifest, ptx) = (read("ptx/MANIFEST"), read("ptx/attention_decode.sm_90a.ptx"));
    let decode = entries(&manifest, &ptx);
    assert_eq!(decode.len(), 12, "two types, three widths of a head, with a cap and without");
    for (entry, text) in decode {
        let d: u32 = entry.name.split('_').find_map(|word| word.parse().ok()).unwrap();
        let products = 2 * (4 * d / 16 + 4 * d / 64);
        assert_eq!([entry.field("hgmma"), entry.field("depbar")], [&products.to_string(), "12"], "{}", entry.name);
        assert!(entry.field("tma").split(['/', ',']).all(|copy| copy == "4d"), "{}", entry.name);
        assert_eq!(text.matches("fence.acq_rel.gpu").count(), 2, "{}", entry.name);
        assert!(!text.contains("membar"), "{}", entry.name);
    }
}
