//! Registers that some path through a function may read before anything wrote them.
//!
//! Most registers have their one write in front of every read, so nothing needs to be known of them when the
//! kernel runs. This finds the others: from each read backwards along the control flow, to the writes or to
//! the beginning of the function.

use crate::isa::control::Control;
use crate::isa::{Code, Op};
use crate::module::{FunctionInfo, Program, Row};
use std::collections::HashSet;

/// Steps that one function may take. Beyond them every register counts as found, which costs time and changes
/// no verdict.
const MAX_STEPS: usize = 1 << 24;

/// Whether an instruction only makes registers out of registers. A compiler may put it where its operands
/// have no value yet, as long as nothing comes of it; so its result is unwritten where an operand is, and it
/// is no fault.
pub(crate) fn is_pure(op: &Op) -> bool {
    matches!(op, Op::Int(_) | Op::Packed(_) | Op::Float(_) | Op::Half(_) | Op::Compare(_) | Op::Convert(_) | Op::Move(_))
}

/// Where control may go after the instruction at `pc`, other than to the next one; and whether it may go to
/// the next one.
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

/// What must be watched when the function runs: the registers that may be read unwritten, and those that may
/// be made of them.
pub(crate) fn find(program: &Program, f: &FunctionInfo) -> HashSet<Row> {
    let (blocks, writes) = (Blocks::new(program, f), Writes::new(program, f));
    let rows = writes.ends.len();
    // By register: the blocks that read it before they write it.
    let mut open: Vec<Vec<u32>> = vec![Vec::new(); rows];
    let mut here = vec![u32::MAX; rows];
    for pc in f.start..f.end {
        let block = blocks.of(pc);
        let (touches, guard) = (program.touches_of(pc), program.code[pc as usize].guard);
        let reads = touches.iter().filter(|t| !t.write).map(|t| t.row).chain(guard.slot().map(Row::P));
        for number in reads.map(|row| writes.number(row)) {
            if here[number] != block && open[number].last() != Some(&block) {
                open[number].push(block);
            }
        }
        if guard.always() {
            touches.iter().filter(|t| t.write).for_each(|t| here[writes.number(t.row)] = block);
        }
    }
    // From there backwards, until a block writes it whatever its predicates are.
    let (mut passed, mut steps) = (vec![u32::MAX; blocks.ends.len()], 0);
    let mut found = HashSet::new();
    for (number, mut places) in open.into_iter().enumerate() {
        let writing = |block: u32| {
            let (first, last) = blocks.ends[block as usize];
            let list = writes.of(number);
            let inside = &list[list.partition_point(|&at| at < first)..list.partition_point(|&at| at <= last)];
            inside.iter().any(|&at| program.code[at as usize].guard.always())
        };
        while let Some(block) = places.pop() {
            if block == 0 {
                found.insert(writes.row(number));
                break;
            }
            for &from in &blocks.before[block as usize] {
                steps += 1;
                if std::mem::replace(&mut passed[from as usize], number as u32) != number as u32 && !writing(from) {
                    places.push(from);
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
            let Code { op, guard, .. } = &program.code[pc as usize];
            let touches = program.touches_of(pc);
            let unsure = |row: &Row| found.contains(row);
            let made = is_pure(op)
                && (touches.iter().any(|t| !t.write && unsure(&t.row)) || guard.slot().map(Row::P).is_some_and(|row| unsure(&row)));
            if made {
                touches.iter().filter(|t| t.write).for_each(|t| more |= found.insert(t.row));
            }
        }
    }
    found
}
