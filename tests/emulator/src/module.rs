//! A loaded image and its kernels.

use crate::error::LaunchError;
use crate::front::ast::Loc;
use crate::front::unwritten;
use crate::isa::Code;
use crate::isa::ty::{Reg, Src};
use crate::report::Place;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// A loaded image. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Module {
    pub(crate) program: Arc<Program>,
}

/// One entry of a module, with its launch attributes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub(crate) program: Arc<Program>,
    pub(crate) function: usize,
    pub(crate) max_dynamic_shared: u32,
}

/// What an image became.
#[derive(Debug, Default)]
pub(crate) struct Program {
    pub text: String,
    pub files: HashMap<u32, String>,
    pub code: Vec<Code>,
    /// PTX line of each instruction.
    pub lines: Vec<u32>,
    /// Index into `loc_table` of each instruction, plus 1; 0 where there is none.
    pub locs: Vec<u32>,
    pub loc_table: Vec<Loc>,
    /// Label positions, ascending.
    pub labels: Vec<(u32, String)>,
    pub functions: Vec<FunctionInfo>,
    /// Greatest alignment among the external arrays of shared memory, at least 16: `ptxas` rounds every
    /// entry's static part up to it.
    pub dynamic_align: u32,
    /// Branch tables.
    pub tables: Vec<Vec<u32>>,
    /// Registers each instruction touches, its guard left out; `touch_ends[pc]` ends its part.
    pub touches: Vec<Touch>,
    pub touch_ends: Vec<u32>,
}

/// A module variable and its initial bytes.
#[derive(Debug)]
pub(crate) struct GlobalVar {
    pub name: String,
    pub constant: bool,
    pub bytes: u64,
    pub init: Vec<u8>,
    /// Byte offset, variable, addend.
    pub relocations: Vec<(usize, String, i64)>,
}

/// A parameter's place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub offset: u32,
    pub bytes: u32,
    pub align: u32,
}

/// A register of a frame: of up to 32 bits, of 64 bits, a predicate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Row {
    W(u32),
    D(u32),
    P(u32),
}

impl Row {
    pub fn of(reg: Reg) -> Option<Row> {
        match reg {
            Reg::W(slot, _) => Some(Row::W(slot)),
            Reg::D(slot) => Some(Row::D(slot)),
            Reg::Sink => None,
        }
    }

    pub fn of_src(src: Src) -> Option<Row> {
        match src {
            Src::W(slot) => Some(Row::W(slot)),
            Src::D(slot) => Some(Row::D(slot)),
            Src::Imm(_) | Src::Special(_) => None,
        }
    }
}

/// An instruction reads or writes a register.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Touch {
    pub row: Row,
    pub write: bool,
}

/// What a function asks of the machine.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Uses {
    pub async_proxy: bool,
    pub cp_async: bool,
}

#[derive(Debug, Default)]
pub(crate) struct FunctionInfo {
    pub name: String,
    pub entry: bool,
    pub has_body: bool,
    pub defined: bool,
    pub start: u32,
    pub end: u32,
    pub rows32: u32,
    pub rows64: u32,
    pub rowsp: u32,
    pub local_bytes: u32,
    pub params: Vec<Slot>,
    /// Bytes of the parameters alone: the blob of an entry.
    pub param_bytes: u32,
    pub rets: Vec<Slot>,
    /// Parameters, results and the parameter variables of calls.
    pub frame_param_bytes: u32,
    pub static_shared: u32,
    pub max_threads: Option<[u32; 3]>,
    pub exact_threads: Option<[u32; 3]>,
    pub cluster: Option<[u32; 3]>,
    pub uses: Uses,
    /// 32-bit rows that wgmma works on.
    pub watched: HashSet<u32>,
    /// Registers that may be read before they are written, and those that may be made of such, with their
    /// names.
    pub unwritten: HashMap<Row, String>,
}

impl Program {
    pub fn new(text: &str) -> Self {
        Self { text: text.to_owned(), dynamic_align: 16, ..Self::default() }
    }

    /// Where the dynamic shared memory of an entry begins, which is what its static part takes.
    pub fn dynamic_offset(&self, function: usize) -> u32 {
        self.functions[function].static_shared.next_multiple_of(self.dynamic_align)
    }

    /// After lowering a function: marks the instructions that touch a register wgmma works on, and those that
    /// touch one that may be read unwritten. `name` gives the registers' names.
    pub fn finish(&mut self, function: usize, name: impl Fn(Row) -> String) {
        let f = &self.functions[function];
        let unwritten = unwritten::find(self, f);
        for pc in f.start..f.end {
            let rows = self.touches_of(pc).iter().map(|t| t.row);
            let code = &self.code[pc as usize];
            let watched = !f.watched.is_empty() && rows.clone().any(|row| matches!(row, Row::W(slot) if f.watched.contains(&slot)));
            let guard = code.guard.slot().map(Row::P);
            let unsure = !unwritten.is_empty() && rows.chain(guard).any(|row| unwritten.contains(&row));
            let code = &mut self.code[pc as usize];
            (code.watched, code.unsure) = (watched, unsure);
        }
        self.functions[function].unwritten = unwritten.into_iter().map(|row| (row, name(row))).collect();
    }

    /// Registers the instruction at `pc` touches, its guard left out.
    pub fn touches_of(&self, pc: u32) -> &[Touch] {
        let start = if pc == 0 { 0 } else { self.touch_ends[pc as usize - 1] };
        &self.touches[start as usize..self.touch_ends[pc as usize] as usize]
    }

    /// What all functions ask of the machine.
    pub fn uses(&self) -> Uses {
        let any = |f: fn(&Uses) -> bool| self.functions.iter().any(|i| f(&i.uses));
        Uses { async_proxy: any(|u| u.async_proxy), cp_async: any(|u| u.cp_async) }
    }

    /// Source file and line of `pc`, outermost inlined position for keys.
    pub fn source_key(&self, pc: u32) -> (u32, u32, u32) {
        match self.locs[pc as usize] {
            0 => (u32::MAX, self.lines[pc as usize], 0),
            i => self.loc_table[i as usize - 1].at,
        }
    }

    pub fn place(&self, pc: u32) -> Place {
        let pc = pc.min(self.lines.len().saturating_sub(1) as u32);
        let line = self.lines.get(pc as usize).copied().unwrap_or(0);
        let text = self.text.lines().nth((line as usize).saturating_sub(1)).unwrap_or("").trim();
        let mut ptx_text: String = text.chars().take(100).collect();
        if ptx_text.len() < text.len() {
            ptx_text.push_str("...");
        }
        let function = self.functions.iter().find(|f| (f.start..f.end).contains(&pc));
        let start = function.map_or(0, |f| f.start);
        let label = self.labels.iter().rev().find(|(at, _)| (start..=pc).contains(at)).map(|(_, name)| name.clone());
        let mut place = Place { ptx_line: line, ptx_text, label, ..Place::default() };
        place.function = function.map_or_else(String::new, |f| f.name.clone());
        let name_of = |file: u32| self.files.get(&file).cloned().unwrap_or_else(|| format!("file {file}"));
        if let Some(i) = self.locs.get(pc as usize).copied().filter(|&i| i > 0) {
            let loc = &self.loc_table[i as usize - 1];
            place.source_file = Some(name_of(loc.at.0));
            place.source_line = loc.at.1;
            // Follow the chain of inlined positions to the outermost call site.
            let mut at = loc.inlined_at;
            for _ in 0..16 {
                let Some(position) = at else { break };
                place.inlined_at = Some(format!("{}:{}", name_of(position.0), position.1));
                at = self.loc_table.iter().find(|l| l.at == position).and_then(|l| l.inlined_at);
            }
        }
        place
    }
}

impl Module {
    /// The entry called `name`.
    ///
    /// # Errors
    ///
    /// [`LaunchError::NoKernel`] with the names there are.
    pub fn kernel(&self, name: &str) -> Result<Kernel, LaunchError> {
        let found = self.program.functions.iter().position(|f| f.entry && f.defined && f.name == name);
        let Some(function) = found else {
            let entries = self.entries().into_iter().map(str::to_owned).collect();
            return Err(LaunchError::NoKernel { name: name.to_owned(), entries });
        };
        let max_dynamic_shared = (48u32 << 10).saturating_sub(self.program.dynamic_offset(function));
        Ok(Kernel { program: Arc::clone(&self.program), function, max_dynamic_shared })
    }

    /// Names of the entries, in the order of the image.
    pub fn entries(&self) -> Vec<&str> {
        self.program.functions.iter().filter(|f| f.entry && f.defined).map(|f| f.name.as_str()).collect()
    }
}

impl Kernel {
    pub(crate) fn info(&self) -> &FunctionInfo {
        &self.program.functions[self.function]
    }

    /// The entry's name.
    pub fn name(&self) -> &str {
        &self.info().name
    }

    /// Bytes of the parameter blob a launch must give.
    pub fn param_bytes(&self) -> usize {
        self.info().param_bytes as usize
    }

    /// `(offset, bytes, alignment)` of each declared parameter.
    pub fn params(&self) -> Vec<(usize, usize, usize)> {
        self.info().params.iter().map(|s| (s.offset as usize, s.bytes as usize, s.align as usize)).collect()
    }

    /// 32-bit register rows the entry's body names. An upper bound before allocation, not what `ptxas` would print.
    pub fn registers(&self) -> u32 {
        self.info().rows32 + 2 * self.info().rows64
    }

    /// Bytes of statically declared shared memory, without what rounds them up to the alignment of the
    /// dynamic part.
    pub fn static_shared_bytes(&self) -> u32 {
        self.info().static_shared
    }

    /// Bytes of local memory per thread, callees not included.
    pub fn local_bytes(&self) -> u32 {
        self.info().local_bytes
    }

    /// Threads per block the entry allows: its `.maxntid` or `.reqntid`, at most 1024.
    pub fn max_threads(&self) -> u32 {
        let info = self.info();
        let product = |d: [u32; 3]| d.iter().fold(1u32, |a, &b| a.saturating_mul(b));
        info.exact_threads.or(info.max_threads).map_or(1024, product).min(1024)
    }

    /// Cluster shape the entry requires, if it does.
    pub fn cluster(&self) -> Option<[u32; 3]> {
        self.info().cluster
    }

    /// Largest dynamic shared memory a launch may ask for: 48 KiB less the static part until raised.
    pub fn max_dynamic_shared(&self) -> u32 {
        self.max_dynamic_shared
    }

    /// Raises (or lowers) the dynamic shared memory limit.
    ///
    /// # Errors
    ///
    /// [`LaunchError::Limit`] if static and dynamic together pass 232,448 bytes.
    pub fn set_max_dynamic_shared(&mut self, bytes: u32) -> Result<(), LaunchError> {
        let limit = 232_448 - self.program.dynamic_offset(self.function).min(232_448);
        if bytes > limit {
            return Err(LaunchError::Limit { what: "dynamic shared memory limit", got: bytes.into(), limit: limit.into() });
        }
        self.max_dynamic_shared = bytes;
        Ok(())
    }
}
