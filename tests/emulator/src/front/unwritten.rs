//! Registers that some path through a function may read before anything wrote them.
//!
//! Most registers have their one write in front of every read, so nothing needs to be known of them when the kernel runs. This finds
//! the others: from each read backwards along the control flow, to the writes or to the beginning of the function. An instruction that
//! merely copies (see [`copies`]) is no read: what it copies matters where the copy is read.

use crate::isa::control::Control;
use crate::isa::ty::{PSrc, Src};
use crate::isa::wgmma::Wgmma;
use crate::isa::{Code, Op, compare::Compare, moves::Move};
use crate::module::{FunctionInfo, Program, Row};
use std::collections::HashSet;

/// Steps that one function may take. Beyond them every register counts as found, which costs time and changes no verdict.
const MAX_STEPS: usize = 1 << 24;

/// Where an instruction only copies registers: to what, and from what.
pub(crate) fn copies(op: &Op) -> Option<(Vec<Row>, Vec<Row>)> {
    let of = |src: &Src| Row::of_src(*src);
    let predicate = |p: &PSrc| if let PSrc::Reg { slot, .. } = p { Some(Row::P(*slot)) } else { None };
    Some(match op {
        Op::Move(Move::Mov32 { d, a } | Move::Mov64 { d, a }) => (Row::of(*d).into_iter().collect(), of(a).into_iter().collect()),
        Op::Move(Move::Pack { d, parts, .. }) => (Row::of(*d).into_iter().collect(), parts.iter().filter_map(of).collect()),
        Op::Move(Move::Unpack { parts, a, .. }) => (parts.iter().filter_map(|p| Row::of(*p)).collect(), of(a).into_iter().collect()),
        Op::Compare(Compare::Selp { d, a, b, .. }) => (Row::of(*d).into_iter().collect(), [a, b].into_iter().filter_map(of).collect()),
        Op::Compare(Compare::Pred { op: None, p, a, .. }) => (p.map(Row::P).into_iter().collect(), predicate(a).into_iter().collect()),
        _ => return None,
    })
}

/// Whether [`copies`] has an answer.
fn is_copy(op: &Op) -> bool {
    matches!(
        op,
        Op::Move(Move::Mov32 { .. } | Move::Mov64 { .. } | Move::Pack { .. } | Move::Unpack { .. })
            | Op::Compare(Compare::Selp { .. } | Compare::Pred { op: None, .. })
    )
}

/// The predicate that chooses between the sources of a copy: a read.
pub(crate) fn chooser(op: &Op) -> Option<u32> {
    match op {
        Op::Compare(Compare::Selp { p: PSrc::Reg { slot, .. }, .. }) => Some(*slot),
        _ => None,
    }
}

/// Calls `f` with each register that an instruction reads for its own work.
fn reads(program: &Program, pc: u32, mut f: impl FnMut(Row)) {
    let code = &program.code[pc as usize];
    code.guard.slot().into_iter().for_each(|slot| f(Row::P(slot)));
    if is_copy(&code.op) {
        return chooser(&code.op).into_iter().for_each(|slot| f(Row::P(slot)));
    }
    let fresh: &[u32] = match &code.op {
        Op::Wgmma(wgmma) => match &**wgmma {
            // With scale-d false the accumulators are written only.
            Wgmma::Product(p) if p.scale_d == PSrc::Const(false) => &p.d,
            _ => &[],
        },
        _ => &[],
    };
    let touches = program.touches_of(pc).iter().filter(|t| !t.write);
    touches.map(|t| t.row).filter(|row| !matches!(row, Row::W(slot) if fresh.contains(slot))).for_each(f);
}

/// Where control may go after the instruction at `pc`, other than to the next one; and whether it may go to the next one.
fn successors(program: &Program, pc: u32) -> (&[u32], bool) {
    let Code { op, guard, .. } = &program.code[pc as usize];
    match op {
        Op::Control(Control::Bra { target }) => (std::slice::from_ref(target), !guard.always()),
        Op::Control(Control::BrxIdx { table, .. }) => (&program.tables[*table as usize], !guard.always()),
        Op::Control(Control::Ret | Control::Exit | Control::Trap | Control::AssertFail) => (&[], !guard.always()),
        _ => (&[], true),
    }
}

/// The blocks of a function.
struct Blocks {
    /// First instruction of the function.
    start: u32,
    /// First and last instruction of each block.
    ends: Vec<(u32, u32)>,
    /// Blocks that control may come from.
    before: Vec<Vec<u32>>,
    /// The block of each instruction.
    of: Vec<u32>,
}

impl Blocks {
    fn new(program: &Program, f: &FunctionInfo) -> Self {
        let inside = |pc: &&u32| (f.start..f.end).contains(*pc);
        let mut leads = vec![false; (f.end - f.start) as usize + 1];
        for pc in f.start..f.end {
            let (targets, next) = successors(program, pc);
            targets.iter().filter(inside).for_each(|t| leads[(t - f.start) as usize] = true);
            leads[(pc + 1 - f.start) as usize] |= !targets.is_empty() || !next;
        }
        let mut blocks = Self { start: f.start, ends: Vec::new(), before: Vec::new(), of: Vec::new() };
        for pc in f.start..f.end {
            if pc == f.start || leads[(pc - f.start) as usize] {
                blocks.ends.push((pc, pc));
            }
            let block = blocks.ends.len() - 1;
            blocks.ends[block].1 = pc;
            blocks.of.push(block as u32);
        }
        blocks.before = vec![Vec::new(); blocks.ends.len()];
        for (block, &(_, last)) in blocks.ends.iter().enumerate() {
            let (targets, next) = successors(program, last);
            for to in targets.iter().chain(next.then_some(&(last + 1))).filter(inside) {
                blocks.before[blocks.of[(to - f.start) as usize] as usize].push(block as u32);
            }
        }
        blocks
    }

    fn of(&self, pc: u32) -> u32 {
        self.of[(pc - self.start) as usize]
    }
}

/// The writes of each register, and numbers for registers.
struct Writes<'p> {
    f: &'p FunctionInfo,
    /// Where the writes of each register end in `at`.
    ends: Vec<u32>,
    at: Vec<u32>,
}

impl<'p> Writes<'p> {
    fn new(program: &Program, f: &'p FunctionInfo) -> Self {
        let mut writes = Self { f, ends: vec![0; (f.rows32 + f.rows64 + f.rowsp) as usize], at: Vec::new() };
        let all = || (f.start..f.end).flat_map(|pc| program.touches_of(pc).iter().filter(|t| t.write).map(move |t| (t.row, pc)));
        for (row, _) in all() {
            let number = writes.number(row);
            writes.ends[number] += 1;
        }
        let mut total = 0;
        for end in &mut writes.ends {
            total += std::mem::replace(end, total);
        }
        writes.at = vec![0; total as usize];
        // Each end moves from the beginning of its list as the list is filled.
        for (row, pc) in all() {
            let number = writes.number(row);
            writes.at[writes.ends[number] as usize] = pc;
            writes.ends[number] += 1;
        }
        writes
    }

    fn number(&self, row: Row) -> usize {
        (match row {
            Row::W(slot) => slot,
            Row::D(slot) => self.f.rows32 + slot,
            Row::P(slot) => self.f.rows32 + self.f.rows64 + slot,
        }) as usize
    }

    fn row(&self, number: usize) -> Row {
        let (number, w, d) = (number as u32, self.f.rows32, self.f.rows64);
        match number {
            n if n < w => Row::W(n),
            n if n < w + d => Row::D(n - w),
            n => Row::P(n - w - d),
        }
    }

    /// Places of the writes of a register, ascending.
    fn of(&self, number: usize) -> &[u32] {
        let begin = if number == 0 { 0 } else { self.ends[number - 1] };
        &self.at[begin as usize..self.ends[number] as usize]
    }
}

/// What must be watched when the function runs: the registers that may be read unwritten, and those that may hold copies of them.
pub(crate) fn find(program: &Program, f: &FunctionInfo) -> HashSet<Row> {
    let (blocks, writes) = (Blocks::new(program, f), Writes::new(program, f));
    let rows = writes.ends.len();
    // By register: places, each in a block, before which its value matters.
    let mut open: Vec<Vec<(u32, u32)>> = vec![Vec::new(); rows];
    // Most reads have their write in the same block.
    let mut here = vec![u32::MAX; rows];
    for pc in f.start..f.end {
        let block = blocks.of(pc);
        reads(program, pc, |row| {
            let number = writes.number(row);
            if here[number] != block {
                open[number].push((pc, block));
            }
        });
        let code = &program.code[pc as usize];
        if code.guard.always() {
            let value = if is_copy(&code.op) { u32::MAX } else { block };
            program.touches_of(pc).iter().filter(|t| t.write).for_each(|t| here[writes.number(t.row)] = value);
        }
    }
    let mut todo: Vec<usize> = (0..rows).filter(|&number| !open[number].is_empty()).collect();
    let mut followed = vec![false; (f.end - f.start) as usize];
    let mut passed = vec![0; blocks.ends.len()];
    let mut found = HashSet::new();
    let (mut turn, mut steps) = (0u32, 0);
    while let Some(number) = todo.pop() {
        turn += 1;
        let mut places = std::mem::take(&mut open[number]);
        while let Some((before, block)) = places.pop() {
            let list = writes.of(number);
            let list = &list[..list.partition_point(|&at| at < before)];
            let mut written = false;
            for &at in list.iter().rev().take_while(|&&at| at >= blocks.ends[block as usize].0) {
                steps += 1;
                let code = &program.code[at as usize];
                if is_copy(&code.op) && !std::mem::replace(&mut followed[(at - f.start) as usize], true) {
                    for from in copies(&code.op).map_or_else(Vec::new, |(_, from)| from) {
                        open[writes.number(from)].push((at, block));
                        todo.push(writes.number(from));
                    }
                }
                written = code.guard.always();
                if written {
                    break;
                }
            }
            if written {
                continue;
            }
            if block == 0 {
                found.insert(writes.row(number));
            }
            for &from in &blocks.before[block as usize] {
                steps += 1;
                if std::mem::replace(&mut passed[from as usize], turn) != turn {
                    places.push((blocks.ends[from as usize].1 + 1, from));
                }
            }
        }
        if steps > MAX_STEPS {
            return (0..rows).map(|number| writes.row(number)).collect();
        }
    }
    let mut more = !found.is_empty();
    while more {
        more = false;
        for pc in f.start..f.end {
            let op = &program.code[pc as usize].op;
            if is_copy(op)
                && let Some((to, from)) = copies(op)
                && from.iter().any(|row| found.contains(row))
            {
                to.into_iter().for_each(|row| more |= found.insert(row));
            }
        }
    }
    found
}
