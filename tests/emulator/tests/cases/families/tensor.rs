//! Bulk tensor copies: loads, stores and reductions of rank 1 to 5, every swizzle, boxes that leave the tensor, multicast.
//!
//! A load's picture of shared memory is dumped as it lies, so the swizzle is compared byte by byte.

use super::super::{Arg, Case, Element, Expect, Swizzle, TensorMap};
use super::Family;

pub fn family() -> Family {
    let mut cases = loads();
    cases.extend(stores());
    cases.extend(multicasts());
    cases.push(replaced());
    Family::table("tensor", image(), cases)
}

const THREADS: u32 = 64;

fn image() -> String {
    let mut text = String::from(
        "// Bulk tensor copies: loads, stores and reductions of rank 1 to 5, and multicast.\n\
         // Written from tests/cases/families/tensor.rs. Shared memory holds the box, then the mbarrier.\n\
         .version 8.4\n.target sm_90a\n.address_size 64\n\n.extern .shared .align 1024 .b8 tile[];\n",
    );
    for rank in 1..=5 {
        text += &load(rank);
        text += &store(&format!("store_{rank}d"), rank, &format!("cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group"));
    }
    text += &(hinted(2) + &hinted(3));
    for op in ["add", "min", "max", "and", "or", "xor"] {
        text += &store(&format!("reduce_{op}"), 2, &format!("cp.reduce.async.bulk.tensor.2d.global.shared::cta.{op}.tile.bulk_group"));
    }
    let multicast = MULTICAST.replace("DUMP\n", DUMP);
    let in_3d = multicast
        .replace("entry multicast(", "entry multicast_3d(")
        .replace("tensor.2d", "tensor.3d")
        .replace("{x, zero}", "{x, zero, zero}");
    text + &multicast + &in_3d + &REPLACE.replace("DUMP\n", &DUMP.replace("done", "dumped"))
}

fn coordinates(rank: usize) -> (String, String, String) {
    let parameters = (0..rank).map(|i| format!(", .param .u32 at{i}")).collect();
    let loads = (0..rank).map(|i| format!("\tld.param.u32 c{i}, [at{i}];\n")).collect();
    let list = (0..rank).map(|i| format!("c{i}")).collect::<Vec<_>>().join(", ");
    (parameters, loads, list)
}

/// Waits for the box and writes shared memory to `out`, four bytes per thread and step.
const DUMP: &str = "\tmov.u32 i, %tid.x;\n\tshl.b32 i, i, 2;\ndump:\n\tsetp.ge.u32 p, i, bytes;\n\t@p bra done;\n\tadd.u32 from, base, i;\n\tld.shared.b32 word, [from];\n\
                    \tcvt.u64.u32 at, i;\n\tadd.u64 at, at, to;\n\tst.global.b32 [at], word;\n\tmov.u32 from, %ntid.x;\n\tmad.lo.u32 i, from, 4, i;\n\tbra dump;\ndone:\n";

fn load(rank: usize) -> String {
    let (parameters, loads, list) = coordinates(rank);
    format!(
        "\n.visible .entry load_{rank}d(.param .align 128 .b8 map[128], .param .u64 out, .param .u32 size{parameters})\n{{\n\
         \t.reg .pred p;\n\t.reg .b32 base, bar, bytes, i, from, word, c<{rank}>;\n\t.reg .b64 desc, to, at;\n\
         \tld.param.u32 bytes, [size];\n\tld.param.u64 to, [out];\n{loads}\tmov.u32 base, tile;\n\tadd.u32 bar, base, bytes;\n\tmov.b64 desc, map;\n\tcvta.param.u64 desc, desc;\n\
         \tmov.u32 i, %tid.x;\n\tsetp.ne.u32 p, i, 0;\n\t@p bra begun;\n\tprefetch.tensormap [desc];\n\tmbarrier.init.shared::cta.b64 [bar], 1;\n\tfence.mbarrier_init.release.cluster;\n\
         \tmbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], bytes;\n\
         \tcp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [base], [desc, {{{list}}}], [bar];\n\
         begun:\n\tbar.sync 0;\nwait:\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [bar], 0;\n\t@!p bra wait;\n{DUMP}\tret;\n}}\n"
    )
}

/// A load with a cache policy, which changes nothing that can be seen.
fn hinted(rank: usize) -> String {
    load(rank)
        .replace(&format!("load_{rank}d"), &format!("load_{rank}d_hint"))
        .replace(".mbarrier::complete_tx::bytes [base]", ".mbarrier::complete_tx::bytes.L2::cache_hint [base]")
        .replace("}], [bar];", "}], [bar], at;")
        .replace("\tmov.b64 desc, map;", "\tcreatepolicy.fractional.L2::evict_first.b64 at, 0f3F800000;\n\tmov.b64 desc, map;")
}

fn store(entry: &str, rank: usize, opcode: &str) -> String {
    let (parameters, loads, list) = coordinates(rank);
    format!(
        "\n.visible .entry {entry}(.param .align 128 .b8 map[128], .param .u64 in, .param .u32 size{parameters})\n{{\n\
         \t.reg .pred p;\n\t.reg .b32 base, bytes, i, to, word, c<{rank}>;\n\t.reg .b64 desc, from, at;\n\
         \tld.param.u32 bytes, [size];\n\tld.param.u64 from, [in];\n{loads}\tmov.u32 base, tile;\n\tmov.b64 desc, map;\n\tcvta.param.u64 desc, desc;\n\
         \tmov.u32 i, %tid.x;\n\tshl.b32 i, i, 2;\nfill:\n\tsetp.ge.u32 p, i, bytes;\n\t@p bra filled;\n\tcvt.u64.u32 at, i;\n\tadd.u64 at, at, from;\n\tld.global.b32 word, [at];\n\
         \tadd.u32 to, base, i;\n\tst.shared.b32 [to], word;\n\tmov.u32 to, %ntid.x;\n\tmad.lo.u32 i, to, 4, i;\n\tbra fill;\nfilled:\n\
         \tfence.proxy.async.shared::cta;\n\tbar.sync 0;\n\tmov.u32 i, %tid.x;\n\tsetp.ne.u32 p, i, 0;\n\t@p bra done;\n\
         \t{opcode} [desc, {{{list}}}], [base];\n\tcp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group 0;\ndone:\n\tret;\n}}\n"
    )
}

/// Makes a map out of nothing, in shared memory and then, from a copy in global memory, another box of it;
/// and loads by both.
const REPLACE: &str = r"
.visible .entry replaced(.param .u64 tensor, .param .u64 workspace, .param .u64 out, .param .u32 size)
{
	.reg .pred p, first;
	.reg .b32 base, bar, object, bytes, i, from, word, zero, x, y, phase;
	.reg .b64 data, map, to, at, stride;
	.shared .align 128 .b8 made[128];
	ld.param.u32 bytes, [size];
	ld.param.u64 data, [tensor];
	ld.param.u64 map, [workspace];
	ld.param.u64 to, [out];
	mov.u32 base, tile;
	add.u32 bar, base, bytes;
	mov.u32 object, made;
	mov.u32 zero, 0;
	mov.u32 i, %tid.x;
	setp.eq.u32 first, i, 0;
	setp.ge.u32 p, i, 32;
	@p bra begun;
	mad.lo.u32 from, i, 4, object;
	st.shared.b32 [from], zero;
	bar.warp.sync -1;
	mov.u64 stride, 256;
	@!first bra made_it;
	tensormap.replace.tile.global_address.shared::cta.b1024.b64 [object], data;
	tensormap.replace.tile.rank.shared::cta.b1024.b32 [object], 1;
	tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [object], 0, 64;
	tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [object], 1, 32;
	tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [object], 0, 128;
	tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [object], 1, 40;
	tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [object], 0, stride;
	tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [object], 0, 1;
	tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [object], 1, 1;
	tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [object], 10;
	tensormap.replace.tile.interleave_layout.shared::cta.b1024.b32 [object], 0;
	tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [object], 3;
	tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [object], 0;
made_it:
	bar.warp.sync -1;
	tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [map], [object], 128;
	@!first bra begun;
	mbarrier.init.shared::cta.b64 [bar], 1;
	fence.mbarrier_init.release.cluster;
begun:
	mov.u32 x, 64;
	mov.u32 y, 20;
	mov.u32 phase, 0;
load:
	bar.sync 0;
	@!first bra wait;
	fence.proxy.tensormap::generic.acquire.gpu [map], 128;
	mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], bytes;
	cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [base], [map, {x, y}], [bar];
wait:
	mbarrier.try_wait.parity.shared::cta.b64 p, [bar], phase;
	@!p bra wait;
DUMP
	bar.sync 0;
	setp.ne.u32 p, phase, 0;
	@p bra done;
	// The same tensor without its last columns, from its second row on.
	add.u64 data, data, 256;
	@first tensormap.replace.tile.global_address.global.b1024.b64 [map], data;
	@first tensormap.replace.tile.global_dim.global.b1024.b32 [map], 0, 70;
	@first fence.proxy.tensormap::generic.release.gpu;
	cvt.u64.u32 at, bytes;
	add.u64 to, to, at;
	mov.u32 phase, 1;
	bra load;
done:
	ret;
}
";

/// Every CTA of the cluster loads its own box (coordinate = rank * step) into slot `rank` of every CTA in `ranks`.
const MULTICAST: &str = r"
.visible .entry multicast(.param .align 128 .b8 map[128], .param .u64 out, .param .u32 size, .param .u32 step, .param .u32 ranks, .param .u32 loads)
{
	.reg .pred p;
	.reg .b32 base, bar, bytes, whole, i, from, word, rank, x, zero;
	.reg .b64 desc, to, at;
	.reg .b16 mask;
	ld.param.u32 bytes, [size];
	ld.param.u64 to, [out];
	ld.param.u32 x, [ranks];
	cvt.u16.u32 mask, x;
	mov.u32 rank, %cluster_ctarank;
	ld.param.u32 x, [step];
	mul.lo.u32 x, x, rank;
	ld.param.u32 whole, [loads];
	mul.lo.u32 whole, whole, bytes;
	mov.u32 base, tile;
	add.u32 bar, base, whole;
	mov.b64 desc, map;
	cvta.param.u64 desc, desc;
	mov.u32 zero, 0;
	mov.u32 i, %tid.x;
	setp.ne.u32 p, i, 0;
	@p bra begun;
	mbarrier.init.shared::cta.b64 [bar], 1;
	fence.mbarrier_init.release.cluster;
	mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], whole;
begun:
	barrier.cluster.arrive.release;
	barrier.cluster.wait.acquire;
	@p bra wait;
	mad.lo.u32 from, rank, bytes, base;
	cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [from], [desc, {x, zero}], [bar], mask;
wait:
	mbarrier.try_wait.parity.shared::cta.b64 p, [bar], 0;
	@!p bra wait;
	mov.u32 bytes, whole;
	mov.u32 x, %ctaid.x;
	mul.wide.u32 at, x, bytes;
	add.u64 to, to, at;
DUMP
	barrier.cluster.arrive;
	barrier.cluster.wait;
	ret;
}
";

/// A tensor in memory, its bytes unlike each other, with `padding` bytes between rows.
struct Tensor {
    map: TensorMap,
    bytes: Vec<u8>,
}

fn tensor(of: usize, element: Element, dims: &[u64], tile: &[u32], swizzle: Swizzle, padding: u64) -> Tensor {
    let mut strides = Vec::new();
    let mut size = dims[0] * element.bytes() as u64;
    for dim in &dims[1..] {
        size = (size + padding).next_multiple_of(16);
        strides.push(size);
        size *= dim;
    }
    let bytes = (0..size).map(|i| (i * 37 + i / 256 * 11 + 5) as u8).collect();
    Tensor { map: TensorMap { of, element, dims: dims.to_vec(), strides, tile: tile.to_vec(), swizzle }, bytes }
}

impl TensorMap {
    /// Marks a case whose strides go beyond what the driver's documentation promises.
    fn strides_as_documented(&self, case: Case) -> Case {
        let multiples = self.strides.windows(2).all(|pair| pair[1].is_multiple_of(pair[0]));
        if multiples { case } else { case.beyond_isa("a driver may want every stride to be a multiple of the one before") }
    }

    fn box_bytes(&self) -> usize {
        self.tile.iter().map(|&t| t as usize).product::<usize>() * self.element.bytes()
    }

    /// For each element of the box at `corner`, in the order of shared memory: its place there, swizzled, and its place in
    /// memory, if it lies inside the tensor or, of one that is stored, in the last 16 bytes of a row that lie there in part.
    fn places(&self, corner: &[i32], stored: bool) -> Vec<(usize, Option<usize>)> {
        let row_bytes = self.dims[0] as usize * self.element.bytes();
        let row = if stored { row_bytes.next_multiple_of(16) } else { row_bytes } / self.element.bytes();
        let count: usize = self.tile.iter().map(|&t| t as usize).product();
        (0..count)
            .map(|linear| {
                let (mut rest, mut memory, mut inside) = (linear, 0i64, true);
                for (d, &tile) in self.tile.iter().enumerate() {
                    let index = i64::from(corner[d]) + (rest % tile as usize) as i64;
                    rest /= tile as usize;
                    inside &= index >= 0 && (index as u64) < if d == 0 { row as u64 } else { self.dims[d] };
                    memory += index * if d == 0 { self.element.bytes() as i64 } else { self.strides[d - 1] as i64 };
                }
                // The swizzle moves whole chunks of sixteen bytes, so the bytes of an element stay together.
                (self.swizzle.apply(linear * self.element.bytes()), inside.then_some(memory as usize))
            })
            .collect()
    }
}

/// The box as it must lie in shared memory.
fn picture(tensor: &Tensor, corner: &[i32]) -> Vec<u8> {
    let width = tensor.map.element.bytes();
    let mut shared = vec![0; tensor.map.box_bytes()];
    for (to, from) in tensor.map.places(corner, false) {
        if let Some(from) = from {
            shared[to..to + width].copy_from_slice(&tensor.bytes[from..from + width]);
        }
    }
    shared
}

/// Boxes inside, across each edge and wholly outside.
fn tensors() -> Vec<(&'static str, Tensor, Vec<Vec<i32>>)> {
    use Element::{Bf16, F32, U8, U16, U32};
    let of = usize::MAX; // set by the caller, who knows the order of arguments
    vec![
        ("1d u32", tensor(of, U32, &[100], &[64], Swizzle::None, 0), vec![vec![0], vec![52], vec![-4], vec![100]]),
        ("1d u8", tensor(of, U8, &[304], &[256], Swizzle::None, 0), vec![vec![0], vec![80]]),
        (
            "2d f32",
            tensor(of, F32, &[20, 30], &[8, 16], Swizzle::None, 0),
            vec![vec![0, 0], vec![8, 3], vec![16, 20], vec![-4, -5], vec![40, 0]],
        ),
        ("2d bf16 padded", tensor(of, Bf16, &[33, 12], &[40, 5], Swizzle::None, 32), vec![vec![0, 0], vec![8, 9]]),
        (
            "2d bf16 128B",
            tensor(of, Bf16, &[128, 40], &[64, 32], Swizzle::B128, 0),
            vec![vec![0, 0], vec![64, 8], vec![104, 30], vec![-16, -1]],
        ),
        ("2d f32 128B", tensor(of, F32, &[64, 20], &[32, 16], Swizzle::B128, 0), vec![vec![32, 4], vec![4, 10]]),
        ("2d u8 128B", tensor(of, U8, &[200, 20], &[128, 16], Swizzle::B128, 0), vec![vec![96, 0]]),
        ("2d bf16 64B", tensor(of, Bf16, &[70, 40], &[32, 32], Swizzle::B64, 0), vec![vec![0, 0], vec![32, 16], vec![56, 20]]),
        ("2d u8 64B", tensor(of, U8, &[128, 40], &[64, 32], Swizzle::B64, 0), vec![vec![16, 1]]),
        ("2d bf16 32B", tensor(of, Bf16, &[64, 40], &[16, 64], Swizzle::B32, 0), vec![vec![0, 0], vec![48, 3]]),
        ("2d u16 32B", tensor(of, U16, &[40, 9], &[16, 16], Swizzle::B32, 0), vec![vec![32, -2]]),
        (
            "3d bf16 128B",
            tensor(of, Bf16, &[64, 10, 3], &[64, 8, 2], Swizzle::B128, 0),
            vec![vec![0, 0, 0], vec![0, 5, 2], vec![0, -1, -1]],
        ),
        ("3d u32", tensor(of, U32, &[10, 7, 5], &[4, 3, 2], Swizzle::None, 16), vec![vec![4, 5, 3], vec![8, 6, 4]]),
        ("4d f32", tensor(of, F32, &[12, 5, 4, 3], &[8, 2, 3, 2], Swizzle::None, 0), vec![vec![0, 0, 0, 0], vec![8, 4, 2, 2]]),
        ("4d bf16 64B", tensor(of, Bf16, &[32, 6, 4, 3], &[32, 4, 2, 2], Swizzle::B64, 0), vec![vec![0, 3, 1, 1]]),
        (
            "5d u8",
            tensor(of, U8, &[32, 4, 3, 3, 2], &[16, 2, 2, 2, 2], Swizzle::None, 0),
            vec![vec![0, 0, 0, 0, 0], vec![16, 3, 2, 2, 1], vec![-16, -1, -1, -1, -1]],
        ),
        (
            "5d bf16 128B",
            tensor(of, Bf16, &[64, 8, 2, 3, 2], &[64, 8, 2, 2, 1], Swizzle::B128, 0),
            vec![vec![0, 0, 0, 1, 1], vec![0, 0, 0, 2, 0]],
        ),
    ]
}

fn corner_args(corner: &[i32]) -> impl Iterator<Item = Arg> + '_ {
    corner.iter().map(|&c| Arg::U32(c as u32))
}

fn loads() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, mut tensor, corners) in tensors() {
        let rank = tensor.map.dims.len();
        tensor.map.of = 3 + rank;
        for corner in corners {
            let size = tensor.map.box_bytes();
            let mut args = vec![Arg::Map(tensor.map.clone()), Arg::output(picture(&tensor, &corner)), Arg::U32(size as u32)];
            args.extend(corner_args(&corner));
            args.push(Arg::input(tensor.bytes.clone()));
            let case = Case::new(format!("load {name} at {corner:?}"), "tensor", format!("load_{rank}d"), THREADS, args);
            cases.push(tensor.map.strides_as_documented(Case { params: 3 + rank, ..case }.shared(size as u32 + 16)));
        }
    }
    let mut hint = tensor(5, Element::Bf16, &[128, 40], &[64, 32], Swizzle::B128, 0);
    hint.map.of = 5;
    let size = hint.map.box_bytes();
    let mut args = vec![Arg::Map(hint.map.clone()), Arg::output(picture(&hint, &[64, 20])), Arg::U32(size as u32)];
    args.extend(corner_args(&[64, 20]));
    args.push(Arg::input(hint.bytes.clone()));
    cases.push(Case { params: 5, ..Case::new("load with a cache hint", "tensor", "load_2d_hint", THREADS, args) }.shared(size as u32 + 16));
    let mut hint = tensor(6, Element::Bf16, &[64, 10, 3], &[64, 8, 2], Swizzle::B128, 0);
    hint.map.of = 6;
    let size = hint.map.box_bytes();
    let mut args = vec![Arg::Map(hint.map.clone()), Arg::output(picture(&hint, &[0, 2, 1])), Arg::U32(size as u32)];
    args.extend(corner_args(&[0, 2, 1]));
    args.push(Arg::input(hint.bytes.clone()));
    let case = Case::new("load of rank 3 with a cache hint", "tensor", "load_3d_hint", THREADS, args);
    cases.push(Case { params: 6, ..case }.shared(size as u32 + 16));
    // The map may lead to the same memory through a smaller outer stride than an inner one.
    let mut panels = tensor(5, Element::Bf16, &[64, 8, 2], &[64, 8, 2], Swizzle::B128, 0);
    panels.map.of = 6;
    panels.map.strides = vec![256, 128];
    panels.bytes.truncate(8 * 256);
    let size = panels.map.box_bytes();
    let mut args = vec![Arg::Map(panels.map.clone()), Arg::output(picture(&panels, &[0, 0, 0])), Arg::U32(size as u32)];
    args.extend(corner_args(&[0, 0, 0]));
    args.push(Arg::input(panels.bytes.clone()));
    let case = Case { params: 6, ..Case::new("load of panels", "tensor", "load_3d", THREADS, args) }.shared(size as u32 + 16);
    cases.push(panels.map.strides_as_documented(case));
    cases
}

fn stores() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, mut tensor, corners) in tensors() {
        let rank = tensor.map.dims.len();
        tensor.map.of = 3 + rank;
        for corner in corners {
            if corner.iter().any(|&at| at < 0) {
                continue; // an illegal instruction
            }
            let (size, width) = (tensor.map.box_bytes(), tensor.map.element.bytes());
            let shared: Vec<u8> = (0..size).map(|i| (i * 91 + i / 128 * 7 + 1) as u8).collect();
            let mut after = tensor.bytes.clone();
            for (from, to) in tensor.map.places(&corner, true) {
                if let Some(to) = to {
                    after[to..to + width].copy_from_slice(&shared[from..from + width]);
                }
            }
            let mut args = vec![Arg::Map(tensor.map.clone()), Arg::input(shared), Arg::U32(size as u32)];
            args.extend(corner_args(&corner));
            args.push(Arg::Buffer { before: tensor.bytes.clone(), after: Expect::Bytes(after) });
            let case = Case::new(format!("store {name} at {corner:?}"), "tensor", format!("store_{rank}d"), THREADS, args);
            cases.push(tensor.map.strides_as_documented(Case { params: 3 + rank, ..case }.shared(size as u32)));
        }
    }
    let ops: [(&str, Element, fn(u32, u32) -> u32); 7] = [
        ("add", Element::U32, u32::wrapping_add),
        ("add", Element::F32, |a, b| (f32::from_bits(a) + f32::from_bits(b)).to_bits()),
        ("min", Element::U32, |a, b| a.min(b)),
        ("max", Element::U32, |a, b| a.max(b)),
        ("and", Element::U32, |a, b| a & b),
        ("or", Element::U32, |a, b| a | b),
        ("xor", Element::U32, |a, b| a ^ b),
    ];
    for (op, element, combine) in ops {
        let mut tensor = tensor(5, element, &[20, 9], &[16, 8], Swizzle::None, 0);
        let number = |i: usize| if element == Element::F32 { (i as f32 - 70.0).to_bits() } else { (i as u32).wrapping_mul(0x9E37_79B9) };
        tensor.bytes = (0..tensor.bytes.len() / 4).flat_map(|i| number(i).to_le_bytes()).collect();
        let shared: Vec<u8> = (0..tensor.map.box_bytes() / 4).flat_map(|i| number(3 * i + 1).to_le_bytes()).collect();
        let corner = [8, 4];
        let mut after = tensor.bytes.clone();
        for (from, to) in tensor.map.places(&corner, true) {
            if let Some(to) = to {
                let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
                let sum = combine(word(&after, to), word(&shared, from));
                after[to..to + 4].copy_from_slice(&sum.to_le_bytes());
            }
        }
        let size = tensor.map.box_bytes() as u32;
        let mut args = vec![Arg::Map(tensor.map.clone()), Arg::input(shared), Arg::U32(size)];
        args.extend(corner_args(&corner));
        args.push(Arg::Buffer { before: tensor.bytes, after: Expect::Bytes(after) });
        let case = Case::new(format!("reduce {op} {element:?}"), "tensor", format!("reduce_{op}"), THREADS, args);
        cases.push(Case { params: 5, ..case }.shared(size));
    }
    cases
}

fn replaced() -> Case {
    let corner = [64, 20];
    let whole = tensor(0, Element::Bf16, &[128, 40], &[64, 32], Swizzle::B128, 0);
    let mut part = tensor(0, Element::Bf16, &[70, 40], &[64, 32], Swizzle::B128, 116);
    part.bytes = [&whole.bytes[256..], &[0; 256]].concat();
    let size = whole.map.box_bytes();
    let want = [picture(&whole, &corner), picture(&part, &corner)].concat();
    let bytes = [&whole.bytes[..], &[0; 256]].concat();
    let args =
        vec![Arg::input(bytes), Arg::Buffer { before: vec![0; 128], after: Expect::Anything }, Arg::output(want), Arg::U32(size as u32)];
    let case = Case::new("tensormap.replace", "tensor", "replaced", THREADS, args).shared(size as u32 + 16);
    case.beyond_isa("ptxas 12.4 takes global_stride in units of 16 bytes")
}

fn multicasts() -> Vec<Case> {
    let mut cases = Vec::new();
    for (ranks, rank) in [(2u32, 2), (4, 2), (2, 3)] {
        let mut tensor = tensor(6, Element::Bf16, &[256, 16, 2][..rank], &[64, 16, 1][..rank], Swizzle::B128, 0);
        tensor.map.of = 6;
        let size = tensor.map.box_bytes();
        // Two clusters, each with every rank's box in every CTA.
        let whole: Vec<u8> = (0..ranks as i32).flat_map(|r| picture(&tensor, &[r * 64, 0, 0][..rank])).collect();
        let want = whole.repeat(2 * ranks as usize);
        let args = vec![
            Arg::Map(tensor.map.clone()),
            Arg::output(want),
            Arg::U32(size as u32),
            Arg::U32(64),
            Arg::U32((1 << ranks) - 1),
            Arg::U32(ranks),
            Arg::input(tensor.bytes.clone()),
        ];
        let (name, entry) = if rank == 2 { ("multicast", "multicast") } else { ("multicast of rank 3", "multicast_3d") };
        let case = Case::new(format!("{name} among {ranks}"), "tensor", entry, THREADS, args);
        cases.push(Case { params: 6, ..case }.grid(2 * ranks).cluster(ranks).shared(ranks * size as u32 + 16));
    }
    cases
}
