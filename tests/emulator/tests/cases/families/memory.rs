//! Loads and stores: every space, width, vector and extension; generic addresses, constants, cache and ordering modifiers.

use super::super::elementwise::{Op, Ty, cases, image};
use super::super::{Arg, Case, u32s};
use super::Family;

pub fn family() -> Family {
    let mut ops = spaces();
    ops.extend(widths());
    ops.extend(variables());
    ops.extend(modifiers());
    let mut all = cases("memory", &ops);
    all.push(special_registers());
    Family::table("memory", image("Loads and stores in every space and width.", &ops) + SPECIAL, all)
}

fn values() -> Vec<[u64; 1]> {
    (0..64u64).map(|i| [(i * 0x0102_0305) ^ 0x8070_6050]).collect()
}

fn own(name: &str, body: &str, want: fn(u64) -> u64) -> Op {
    Op::across(name, body, [Ty::B32], Ty::B32, values(), move |x, i| want(x[i][0]))
}

/// The address of sixteen bytes of this thread in `space`, in register `at`.
fn own_bytes(space: &str) -> String {
    match space {
        "local" => ".local .align 16 .b8 bytes[16];\n.reg .b64 at;\nmov.u64 at, bytes;".to_string(),
        "shared" => ".shared .align 16 .b8 bytes[1024];\n.reg .b32 at;\nmov.u32 at, bytes;\nmad.lo.u32 at, %i, 16, at;".to_string(),
        _ => unreachable!("global memory is reached through parameters"),
    }
}

fn spaces() -> Vec<Op> {
    let mut ops = Vec::new();
    for space in ["local", "shared"] {
        let at = own_bytes(space);
        ops.push(own(&format!("st.{space} ld.{space}"), &format!("{at}\nst.{space}.u32 [at+4], %a;\nld.{space}.u32 %d, [at+4];"), |a| a));
        ops.push(own(
            &format!("{space} bytes of a word"),
            &format!("{at}\n.reg .b32 e;\nst.{space}.u32 [at], %a;\nld.{space}.u8 %d, [at+3];\nld.{space}.u8 e, [at+1];\nmad.lo.u32 %d, %d, 256, e;"),
            |a| (a >> 24) * 256 + (a >> 8 & 0xFF),
        ));
        ops.push(own(
            &format!("{space} generic"),
            &format!(
                "{at}\n.reg .b64 any;\n{}\ncvta.{space}.u64 any, any;\nst.u32 [any+8], %a;\nld.{space}.u32 %d, [at+8];",
                if space == "local" { "mov.u64 any, at;" } else { "cvt.u64.u32 any, at;" }
            ),
            |a| a,
        ));
        ops.push(own(
            &format!("{space} v2 and v4"),
            &format!(
                "{at}\n.reg .b32 p, q, r, s;\nnot.b32 p, %a;\nst.{space}.v4.u32 [at], {{%a, p, 1, 2}};\nld.{space}.v2.u32 {{q, r}}, [at+8];\nld.{space}.v2.u32 {{p, s}}, [at];\n\
                 add.u32 %d, p, s;\nmad.lo.u32 %d, q, 10, %d;\nmad.lo.u32 %d, r, 100, %d;"
            ),
            |_| 0xFFFF_FFFF + 10 + 200,
        ));
        ops.push(own(
            &format!("{space} v4 of bytes"),
            &format!("{at}\n.reg .b32 p, q, r, s;\nst.{space}.u32 [at], %a;\nld.{space}.v4.u8 {{p, q, r, s}}, [at];\nst.{space}.v4.u8 [at+4], {{s, r, q, p}};\nld.{space}.u32 %d, [at+4];"),
            |a| u64::from((a as u32).swap_bytes()),
        ));
        ops.push(own(
            &format!("{space} v4 of halves"),
            &format!(
                "{at}\n.reg .b16 p, q, r, s;\nmov.b32 {{p, q}}, %a;\nst.{space}.v4.b16 [at+8], {{p, q, q, p}};\nld.{space}.u32 %d, [at+12];"
            ),
            |a| (a & 0xFFFF) << 16 | a >> 16,
        ));
        ops.push(own(
            &format!("{space} v2 of doubles"),
            &format!(
                "{at}\n.reg .f64 x, y;\ncvt.rn.f64.u32 x, %a;\nneg.f64 y, x;\nst.{space}.v2.f64 [at], {{y, x}};\nld.{space}.f64 x, [at];\nadd.f64 x, x, 0d41F0000000000000;\ncvt.rzi.u32.f64 %d, x;"
            ),
            |a| (1 << 32) - a,
        ));
    }
    // A run-time index into a local array.
    ops.push(own(
        "local array by index",
        ".local .align 4 .b8 words[64];\n.reg .b64 at, base;\n.reg .b32 k, e;\n.reg .pred p;\nmov.u64 base, words;\nmov.u32 k, 0;\n\
         fill:\nmad.wide.u32 at, k, 4, base;\nadd.u32 e, %a, k;\nst.local.u32 [at], e;\nadd.u32 k, k, 1;\nsetp.lt.u32 p, k, 16;\n@p bra fill;\n\
         and.b32 k, %a, 15;\nmad.wide.u32 at, k, 4, base;\nld.local.u32 %d, [at];",
        |a| a + (a & 15),
    ));
    ops.push(own(
        "isspacep and cvta.to",
        ".shared .align 4 .b8 word[4];\n.local .align 4 .b8 mine[4];\n.reg .pred p, q, r;\n.reg .b64 s, l, g;\nmov.u64 s, word;\ncvta.shared.u64 s, s;\nmov.u64 l, mine;\ncvta.local.u64 l, l;\n\
         ld.param.u64 g, [in0];\nisspacep.shared p, s;\nisspacep.local q, l;\nisspacep.global r, g;\nselp.u32 %d, 1, 0, p;\n@q add.u32 %d, %d, 10;\n@r add.u32 %d, %d, 100;\n\
         isspacep.shared p, g;\nisspacep.global q, l;\n@p add.u32 %d, %d, 1000;\n@q add.u32 %d, %d, 1000;\ncvta.to.shared.u64 s, s;\nmov.u64 l, word;\nsetp.eq.u64 p, s, l;\n@p add.u32 %d, %d, 5;",
        |_| 116,
    ));
    ops
}

/// What a narrow load puts into a wide register, and how much of a register a narrow store takes.
fn widths() -> Vec<Op> {
    let load = |ty: &str, want: fn(u32) -> u32| {
        Op::across(
            &format!("ld.global.{ty}"),
            &format!(".reg .b64 at;\nld.param.u64 at, [in0];\nmad.wide.u32 at, %i, 4, at;\nld.global.{ty} %d, [at];"),
            [Ty::B32],
            Ty::B32,
            values(),
            move |x, i| want(x[i][0] as u32).into(),
        )
    };
    let mut ops = vec![
        load("u8", |a| a & 0xFF),
        load("s8", |a| a as i8 as u32),
        load("u16", |a| a & 0xFFFF),
        load("s16", |a| a as i16 as u32),
        load("b8", |a| a & 0xFF),
        load("nc.u32", |a| a),
        load("ca.u32", |a| a),
        load("cg.u32", |a| a),
        load("volatile.u32", |a| a).body("ld.volatile.global.u32", &wide_load("volatile.global.u32")),
        load("", |a| a).body("ld.relaxed.gpu.global.u32", &wide_load("relaxed.gpu.global.u32")),
        load("", |a| a).body("ld.acquire.sys.global.u32", &wide_load("acquire.sys.global.u32")),
        load("", |a| a).body("ld.global.nc.L1::no_allocate.L2::128B.u32", &wide_load("global.nc.L1::no_allocate.L2::128B.u32")),
        load("", |a| a).body("ld.global.L1::evict_last.u32", &wide_load("global.L1::evict_last.u32")),
        load("", |a| a).body("ld.u32 generic", &wide_load("u32")),
    ];
    ops.push(Op::across(
        "ld.global.s8 to 64 bits",
        ".reg .b64 at;\nld.param.u64 at, [in0];\nmad.wide.u32 at, %i, 4, at;\nld.global.s8 %d, [at];",
        [Ty::B32],
        Ty::B64,
        values(),
        |x, i| x[i][0] as i8 as u64,
    ));
    ops.push(Op::across(
        "ld.global.v4.u32",
        ".reg .b32 p, q, r, s, first;\n.reg .b64 at;\nld.param.u64 at, [in0];\nand.b32 first, %i, 0x3C;\nmad.wide.u32 at, first, 4, at;\nld.global.v4.u32 {p, q, r, s}, [at];\n\
         shl.b32 q, q, 1;\nshl.b32 r, r, 2;\nshl.b32 s, s, 3;\nxor.b32 %d, p, q;\nxor.b32 %d, %d, r;\nxor.b32 %d, %d, s;",
        [Ty::B32],
        Ty::B32,
        values(),
        |x, i| (0..4).map(|k| x[i & 0x3C | k][0] << k).fold(0, |a, b| a ^ b),
    ));
    ops.push(own(
        "narrow stores",
        &format!("{}\n.reg .b32 zero;\nmov.u32 zero, 0;\nst.shared.u32 [at], zero;\nst.shared.u8 [at+1], %a;\nst.shared.u16 [at+2], %a;\nld.shared.u32 %d, [at];", own_bytes("shared")),
        |a| (a & 0xFF) << 8 | (a & 0xFFFF) << 16,
    ));
    ops
}

fn wide_load(form: &str) -> String {
    format!(".reg .b64 at;\nld.param.u64 at, [in0];\nmad.wide.u32 at, %i, 4, at;\nld.{form} %d, [at];")
}

/// Initialised module variables.
fn variables() -> Vec<Op> {
    vec![
        own(
            "ld.const",
            ".reg .b64 at;\n.reg .b32 k;\nand.b32 k, %a, 3;\nmov.u64 at, primes;\nmad.wide.u32 at, k, 4, at;\nld.const.u32 %d, [at];",
            |a| [2, 3, 5, 7][a as usize & 3],
        )
        .prelude(".const .align 4 .u32 primes[4] = {2, 3, 5, 7};"),
        own("ld.const bytes", ".reg .b32 k;\nld.const.u32 %d, [text];\nld.const.u8 k, [text+4];\nadd.u32 %d, %d, k;", |_| {
            0x6F72_657A + 0x21
        })
        .prelude(".const .align 4 .b8 text[6] = {122, 101, 114, 111, 33, 0};"),
        own(
            ".global initialised",
            ".reg .f32 f;\nld.global.f32 f, [halves+8];\ncvt.rzi.u32.f32 %d, f;\nld.global.u32 %a, [halves+12];\nadd.u32 %d, %d, %a;",
            |_| 6,
        )
        .prelude(".global .align 8 .f32 halves[4] = {0f3F000000, 0f3FC00000, 0f40C00000, 0f00000000};"),
        own(".global pointer", ".reg .b64 at;\nld.global.u64 at, [pointer];\nld.global.u32 %d, [at+4];", |_| 44)
            .prelude(".global .align 4 .u32 pointee[2] = {33, 44};\n.global .align 8 .u64 pointer = pointee;"),
        own(
            ".shared of the module",
            ".reg .pred p;\nsetp.eq.u32 p, %i, 9;\n@p st.shared.u32 [common], %i;\nbar.sync 0;\nld.shared.u32 %d, [common];",
            |_| 9,
        )
        .prelude(".shared .align 8 .b8 common[8];"),
    ]
}

/// Caching, ordering and prefetch forms, none of which changes a value read by the thread that wrote it.
fn modifiers() -> Vec<Op> {
    let through_output = |name: &str, store: &str, load: &str| {
        own(
            name,
            &format!(
                ".reg .b64 to;\nld.param.u64 to, [out];\nmad.wide.u32 to, %i, 4, to;\nst.{store} [to], %a;\nmov.u32 %d, 0;\nld.{load} %d, [to];"
            ),
            |a| a,
        )
    };
    vec![
        through_output("st.global.cs", "global.cs.u32", "global.cs.u32"),
        through_output("st.global.wb", "global.wb.u32", "global.lu.u32"),
        through_output("st.relaxed", "relaxed.gpu.global.u32", "relaxed.cluster.global.u32"),
        through_output("st.release", "release.sys.global.u32", "acquire.gpu.global.u32"),
        through_output("st.volatile", "volatile.global.u32", "volatile.global.u32"),
        through_output("st.global.L1", "global.L1::no_allocate.u32", "global.u32"),
        through_output("st generic", "u32", "u32"),
        own(
            "fences and prefetch",
            ".reg .b64 at;\nld.param.u64 at, [in0];\nprefetch.global.L2 [at];\nprefetch.global.L1 [at];\nprefetchu.L1 [at];\nmembar.cta;\nmembar.gl;\nmembar.sys;\nfence.acq_rel.cta;\nfence.acq_rel.gpu;\nfence.sc.sys;\n\
             fence.acq_rel.cluster;\nfence.proxy.async;\nfence.proxy.async.global;\nfence.proxy.async.shared::cta;\nmov.u32 %d, %a;",
            |a| a,
        ),
        own(
            "createpolicy and cache_hint",
            ".reg .b64 at, policy;\nld.param.u64 at, [in0];\nmad.wide.u32 at, %i, 4, at;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 0f3F800000;\nld.global.L2::cache_hint.u32 %d, [at], policy;",
            |a| a,
        ),
        own(
            "streaming forms",
            ".reg .b64 at, to, policy;\n.reg .b32 p, q, r, s, first;\nld.param.u64 at, [in0];\nld.param.u64 to, [out];\nand.b32 first, %i, 0x3C;\nmad.wide.u32 at, first, 4, at;\n\
             createpolicy.fractional.L2::evict_last.L2::evict_unchanged.b64 policy, 0f3F000000;\nld.global.nc.L1::no_allocate.L2::256B.v4.u32 {p, q, r, s}, [at];\nmad.wide.u32 to, %i, 4, to;\n\
             st.global.L2::cache_hint.u32 [to], %a, policy;\nld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {p, q}, [at], policy;\nst.global.cg.u32 [to], %a;\nmov.u32 %d, %a;",
            |a| a,
        ),
        own(
            "pause",
            ".reg .b32 t;\n.reg .b64 u;\nmov.u32 t, %clock;\nmov.u64 u, %clock64;\nmov.u64 u, %globaltimer;\nnanosleep.u32 20;\ngriddepcontrol.launch_dependents;\ngriddepcontrol.wait;\nmov.u32 %d, %a;",
            |a| a,
        ),
    ]
}

/// Every coordinate register in a launch whose numbers all differ.
fn special_registers() -> Case {
    let (grid, block) = ([3u32, 2, 2], [8u32, 4, 2]);
    let mut want = Vec::new();
    for z in 0..grid[2] {
        for y in 0..grid[1] {
            for x in 0..grid[0] {
                for tz in 0..block[2] {
                    for ty in 0..block[1] {
                        for tx in 0..block[0] {
                            want.extend([tx | ty << 8 | tz << 16, x | y << 8 | z << 16, 8 | 4 << 8 | 2 << 16, 3 | 2 << 8 | 2 << 16]);
                        }
                    }
                }
            }
        }
    }
    let case = Case::new("special registers", "memory", "special_registers", 1, vec![Arg::output(u32s(&want))]);
    Case { grid, block, ..case }
}

/// Four words per thread: thread, block, block size, grid size, each as bytes x, y, z.
const SPECIAL: &str = r"
.visible .entry special_registers(.param .u64 out)
{
	.reg .b32 x, y, z, w, t, b, index, n;
	.reg .b32 r<4>;
	.reg .b64 to;
	// Linear thread and block.
	mov.u32 x, %tid.x;
	mov.u32 y, %tid.y;
	mov.u32 z, %tid.z;
	mov.u32 n, %ntid.y;
	mad.lo.u32 t, z, n, y;
	mov.u32 n, %ntid.x;
	mad.lo.u32 t, t, n, x;
	shl.b32 y, y, 8;
	shl.b32 z, z, 16;
	mov.u32 w, %warpid; // where the warp runs, which may be anywhere
	and.b32 w, w, 0;
	or.b32 r0, x, y;
	or.b32 r0, r0, z;
	or.b32 r0, r0, w;
	mov.u32 x, %ctaid.x;
	mov.u32 y, %ctaid.y;
	mov.u32 z, %ctaid.z;
	mov.u32 n, %nctaid.y;
	mad.lo.u32 b, z, n, y;
	mov.u32 n, %nctaid.x;
	mad.lo.u32 b, b, n, x;
	shl.b32 y, y, 8;
	shl.b32 z, z, 16;
	or.b32 r1, x, y;
	or.b32 r1, r1, z;
	mov.u32 x, %ntid.x;
	mov.u32 y, %ntid.y;
	mov.u32 z, %ntid.z;
	mul.lo.u32 n, x, y;
	mul.lo.u32 n, n, z;
	shl.b32 y, y, 8;
	shl.b32 z, z, 16;
	or.b32 r2, x, y;
	or.b32 r2, r2, z;
	mov.u32 x, %nctaid.x;
	mov.u32 y, %nctaid.y;
	mov.u32 z, %nctaid.z;
	shl.b32 y, y, 8;
	shl.b32 z, z, 16;
	or.b32 r3, x, y;
	or.b32 r3, r3, z;
	mad.lo.u32 index, b, n, t;
	ld.param.u64 to, [out];
	mad.wide.u32 to, index, 16, to;
	st.global.v4.b32 [to], {r0, r1, r2, r3};
	ret;
}
";
