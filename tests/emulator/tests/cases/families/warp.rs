//! Warp collectives: shuffles, votes, match, redux, elect, masks; whole warps and parts of them.

use super::super::elementwise::{Op, Ty, cases, image};
use super::super::scrambled;
use super::Family;

pub fn family() -> Family {
    let mut ops = shuffles();
    ops.extend(votes());
    ops.extend(matches());
    ops.extend(reductions());
    ops.extend(masks());
    Family::table("warp", image("Warp collectives: shuffles, votes, match, redux, elect and masks.", &ops), cases("warp", &ops))
}

/// Two warps of values.
fn values() -> Vec<[u64; 1]> {
    scrambled(64, 21, 1000).iter().map(|&x| [x as i64 as u64 & 0xFFFF_FFFF]).collect()
}

/// Few different values, for votes and matches.
fn few() -> Vec<[u64; 1]> {
    scrambled(64, 22, 2).iter().map(|&x| [(x as i64 + 2) as u64]).collect()
}

/// Lane a shuffle reads from, and whether that lane is in range: the ISA's description of `c`, which holds a clamp value in
/// its low five bits and a segment mask in bits 8-12.
fn source(mode: &str, lane: u32, b: u32, c: u32) -> (u32, bool) {
    let (clamp, segment) = (c & 31, c >> 8 & 31);
    let (low, high) = (lane & segment, lane & segment | clamp & !segment);
    let b = b & 31;
    let (from, valid) = match mode {
        "up" => (lane.wrapping_sub(b), lane as i32 - b as i32 >= high as i32),
        "down" => (lane + b, lane + b <= high),
        "bfly" => (lane ^ b, lane ^ b <= high),
        _ => (low | b & !segment, low | b & !segment <= high),
    };
    (if valid { from } else { lane }, valid)
}

fn shuffles() -> Vec<Op> {
    let mut ops = Vec::new();
    // (mode, b, c): whole warps, segments of eight, and distances that leave them.
    let forms = [
        ("up", 1, 0),
        ("up", 5, 0),
        ("up", 3, 0x1800),
        ("up", 31, 0),
        ("down", 1, 31),
        ("down", 17, 31),
        ("down", 3, 0x181F),
        ("down", 33, 31),
        ("bfly", 1, 31),
        ("bfly", 16, 31),
        ("bfly", 9, 0x181F),
        ("bfly", 7, 0x1C1F),
        ("idx", 0, 31),
        ("idx", 13, 31),
        ("idx", 5, 0x181F),
        ("idx", 11, 0x181F),
        ("idx", 20, 15),
    ];
    for (mode, b, c) in forms {
        let name = format!("shfl.sync.{mode} {b} {c:#x}");
        ops.push(Op::across(
            &name,
            &format!("shfl.sync.{mode}.b32 %d, %a, {b}, {c:#x}, 0xFFFFFFFF;"),
            [Ty::B32],
            Ty::B32,
            values(),
            move |x, i| x[i & !31 | source(mode, i as u32 & 31, b, c).0 as usize][0],
        ));
        ops.push(Op::across(
            &format!("{name} in range"),
            &format!(".reg .pred p;\nshfl.sync.{mode}.b32 %d|p, %a, {b}, {c:#x}, 0xFFFFFFFF;\nselp.u32 %d, 1, 0, p;"),
            [Ty::B32],
            Ty::B32,
            values(),
            move |_, i| source(mode, i as u32 & 31, b, c).1.into(),
        ));
    }
    // A lane of its own choice for each thread.
    ops.push(Op::across(
        "shfl.sync.idx by register",
        "shfl.sync.idx.b32 %d, %a, %b, 31, -1;",
        [Ty::B32, Ty::B32],
        Ty::B32,
        (0..64).map(|i| [1000 + i, i * 7 + 3]).collect(),
        |x, i| x[i & !31 | x[i][1] as usize & 31][0],
    ));
    // Sixteen lanes with their mask, while the others do something else.
    ops.push(Op::across(
        "shfl.sync.down in half a warp",
        ".reg .pred p;\nand.b32 %d, %i, 16;\nsetp.eq.u32 p, %d, 0;\nmov.u32 %d, 7;\n@!p bra skip;\nshfl.sync.down.b32 %d, %a, 4, 15, 0xFFFF;\nskip:",
        [Ty::B32],
        Ty::B32,
        values(),
        |x, i| if i & 16 != 0 { 7 } else { x[if i & 15 < 12 { i + 4 } else { i }][0] },
    ));
    // Both halves of a warp shuffle at once, each with its own mask.
    ops.push(Op::across(
        "shfl.sync.bfly in both halves",
        ".reg .pred p;\nand.b32 %d, %i, 16;\nsetp.eq.u32 p, %d, 0;\n@p bra low;\nshfl.sync.bfly.b32 %d, %a, 2, 31, 0xFFFF0000;\nbra done;\nlow:\nshfl.sync.bfly.b32 %d, %a, 1, 31, 0x0000FFFF;\ndone:",
        [Ty::B32],
        Ty::B32,
        values(),
        |x, i| x[if i & 16 != 0 { i ^ 2 } else { i ^ 1 }][0],
    ));
    ops
}

/// Lanes of thread `i`'s warp for which `holds`.
fn ballot(x: &[Vec<u64>], i: usize, holds: impl Fn(&[u64], u32) -> bool) -> u64 {
    (0..32).filter(|&lane| holds(&x[i & !31 | lane as usize], lane)).map(|lane| 1 << lane).sum()
}

fn votes() -> Vec<Op> {
    let vote = |name: &str, predicate: &str, want: fn(u64) -> u64| {
        let (text, d) = if name == "ballot.b32" {
            (format!("vote.sync.{name} %d, p, -1;"), "")
        } else {
            (format!("vote.sync.{name} q, p, -1;"), "\nselp.u32 %d, 1, 0, q;")
        };
        Op::across(
            &format!("vote.sync.{name} {predicate}"),
            &format!(".reg .pred p, q;\nsetp.{predicate} p, %a, 2;\n{text}{d}"),
            [Ty::B32],
            Ty::B32,
            few(),
            {
                let predicate = predicate.to_string();
                move |x, i| {
                    want(ballot(x, i, |v, _| match predicate.as_str() {
                        "eq.u32" => v[0] == 2,
                        "le.u32" => v[0] <= 2,
                        _ => v[0] < 200,
                    }))
                }
            },
        )
    };
    let all = |m: u64| u64::from(m == 0xFFFF_FFFF);
    let any = |m: u64| u64::from(m != 0);
    let uni = |m: u64| u64::from(m == 0 || m == 0xFFFF_FFFF);
    let mut ops = vec![
        vote("ballot.b32", "eq.u32", |m| m),
        vote("ballot.b32", "le.u32", |m| m),
        vote("all.pred", "le.u32", all),
        vote("any.pred", "eq.u32", any),
        vote("uni.pred", "eq.u32", uni),
    ];
    ops.push(Op::across(
        "vote.sync.uni.pred agreed",
        ".reg .pred p, q;\nsetp.lt.u32 p, %a, 200;\nvote.sync.uni.pred q, p, -1;\nselp.u32 %d, 1, 0, q;",
        [Ty::B32],
        Ty::B32,
        few(),
        |_, _| 1,
    ));
    ops.push(Op::across(
        "vote.sync.all.pred negated",
        ".reg .pred p, q;\nsetp.gt.u32 p, %a, 200;\nvote.sync.all.pred q, !p, -1;\nselp.u32 %d, 1, 0, q;",
        [Ty::B32],
        Ty::B32,
        few(),
        |_, _| 1,
    ));
    // Lanes outside the mask give zero bits, whatever their predicate.
    ops.push(Op::across(
        "vote.sync.ballot in even lanes",
        ".reg .pred p, q;\nand.b32 %d, %i, 1;\nsetp.eq.u32 p, %d, 0;\nmov.u32 %d, 9;\n@!p bra skip;\nsetp.le.u32 q, %a, 2;\nvote.sync.ballot.b32 %d, q, 0x55555555;\nskip:",
        [Ty::B32],
        Ty::B32,
        few(),
        |x, i| if i & 1 == 1 { 9 } else { ballot(x, i, |v, lane| lane % 2 == 0 && v[0] <= 2) },
    ));
    ops
}

fn matches() -> Vec<Op> {
    let same = |x: &[Vec<u64>], i: usize| ballot(x, i, |v, _| v[0] == x[i][0]);
    vec![
        Op::across("match.any.sync.b32", "match.any.sync.b32 %d, %a, -1;", [Ty::B32], Ty::B32, few(), same),
        Op::across(
            "match.any.sync.b64",
            "match.any.sync.b64 %d, %a, -1;",
            [Ty::B64],
            Ty::B32,
            few().iter().map(|x| [x[0] << 35]).collect(),
            same,
        ),
        Op::across("match.all.sync.b32 differing", "match.all.sync.b32 %d, %a, -1;", [Ty::B32], Ty::B32, few(), |_, _| 0),
        Op::across(
            "match.all.sync.b32 agreed",
            ".reg .pred p;\nmatch.all.sync.b32 %d|p, %a, -1;\n@!p mov.u32 %d, 5;",
            [Ty::B32],
            Ty::B32,
            (0..64).map(|i| [i / 32]).collect(),
            |_, _| 0xFFFF_FFFF,
        ),
    ]
}

fn reductions() -> Vec<Op> {
    fn warp(x: &[Vec<u64>], i: usize) -> impl Iterator<Item = u32> + '_ {
        x[i & !31..(i & !31) + 32].iter().map(|v| v[0] as u32)
    }
    let redux = |name: &str, want: fn(&[Vec<u64>], usize) -> u64| {
        Op::across(name, &format!("{name} %d, %a, -1;"), [Ty::B32], Ty::B32, values(), want)
    };
    let mut ops = vec![
        redux("redux.sync.add.u32", |x, i| warp(x, i).fold(0u32, u32::wrapping_add).into()),
        redux("redux.sync.add.s32", |x, i| warp(x, i).fold(0u32, u32::wrapping_add).into()),
        redux("redux.sync.min.u32", |x, i| warp(x, i).min().unwrap_or(0).into()),
        redux("redux.sync.max.u32", |x, i| warp(x, i).max().unwrap_or(0).into()),
        redux("redux.sync.min.s32", |x, i| warp(x, i).map(|v| v as i32).min().unwrap_or(0) as u64),
        redux("redux.sync.max.s32", |x, i| warp(x, i).map(|v| v as i32).max().unwrap_or(0) as u64),
        redux("redux.sync.and.b32", |x, i| warp(x, i).fold(u32::MAX, |a, b| a & b).into()),
        redux("redux.sync.or.b32", |x, i| warp(x, i).fold(0, |a, b| a | b).into()),
        redux("redux.sync.xor.b32", |x, i| warp(x, i).fold(0, |a, b| a ^ b).into()),
    ];
    ops.push(Op::across(
        "redux.sync.add.u32 in the low quarter",
        ".reg .pred p;\nand.b32 %d, %i, 24;\nsetp.eq.u32 p, %d, 0;\nmov.u32 %d, 1;\n@p redux.sync.add.u32 %d, %a, 0xFF;",
        [Ty::B32],
        Ty::B32,
        (0..64).map(|i| [i]).collect(),
        |_, i| if i & 24 == 0 { ((i & !31)..(i & !31) + 8).sum::<usize>() as u64 } else { 1 },
    ));
    ops
}

fn masks() -> Vec<Op> {
    let none = || (0..64).map(|i| [i]).collect::<Vec<[u64; 1]>>();
    let lane = |i: usize| i as u64 & 31;
    vec![
        // One lane is elected, and every lane learns which; the ISA does not say which one it is, so the count is what is tested.
        Op::across(
            "elect.sync elects one",
            ".reg .pred p;\nelect.sync %d|p, -1;\nvote.sync.ballot.b32 %d, p, -1;\npopc.b32 %d, %d;",
            [Ty::B32],
            Ty::B32,
            none(),
            |_, _| 1,
        ),
        Op::across(
            "elect.sync names the elected",
            ".reg .pred p, q;\n.reg .b32 m;\nelect.sync %d|p, -1;\nvote.sync.ballot.b32 m, p, -1;\nshr.u32 m, m, %d;\nsetp.eq.u32 q, m, 1;\nselp.u32 %d, 1, 0, q;",
            [Ty::B32],
            Ty::B32,
            none(),
            |_, _| 1,
        ),
        Op::across("activemask whole", "activemask.b32 %d;", [Ty::B32], Ty::B32, none(), |_, _| 0xFFFF_FFFF)
            .beyond_isa("lanes that could execute together need not"),
        Op::across("%lanemask_lt", "mov.u32 %d, %lanemask_lt;", [Ty::B32], Ty::B32, none(), move |_, i| (1 << lane(i)) - 1),
        Op::across("%lanemask_le", "mov.u32 %d, %lanemask_le;", [Ty::B32], Ty::B32, none(), move |_, i| (2 << lane(i)) - 1),
        Op::across("%lanemask_gt", "mov.u32 %d, %lanemask_gt;", [Ty::B32], Ty::B32, none(), move |_, i| !((2 << lane(i)) - 1)),
        Op::across("%lanemask_ge", "mov.u32 %d, %lanemask_ge;", [Ty::B32], Ty::B32, none(), move |_, i| !((1 << lane(i)) - 1)),
        Op::across("%lanemask_eq", "mov.u32 %d, %lanemask_eq;", [Ty::B32], Ty::B32, none(), move |_, i| 1 << lane(i)),
        Op::across("%laneid", "mov.u32 %d, %laneid;", [Ty::B32], Ty::B32, none(), move |_, i| lane(i)),
        Op::across("%ntid", "mov.u32 %d, %ntid.x;", [Ty::B32], Ty::B32, none(), |_, _| 64),
    ]
}
