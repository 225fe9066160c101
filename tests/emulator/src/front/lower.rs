//! Syntax tree to program: layout of variables, register rows, labels, and one [`Op`](crate::isa::Op) per instruction.

use super::ast::{Arg, Function, Init, Inst, Loc, MemBase, Module, Stmt, Var, VarSpace};
use super::scope::{Fixup, Scopes, Symbol};
use super::FrontError;
use crate::isa::ty::{PSrc, Reg, Special, Src, Ty};
use crate::isa::{self, Code, Guard, Mem};
use crate::module::{FunctionInfo, GlobalVar, Program, Slot, Touch};
use std::collections::HashMap;

type Result<T> = std::result::Result<T, FrontError>;

/// Instructions a module may have.
const MAX_CODE: usize = 1 << 24;
/// Local memory one frame may have; the hardware's limit per thread.
const MAX_LOCAL_BYTES: u64 = 512 << 10;
/// Static shared memory one kernel may have.
const MAX_SHARED_BYTES: u64 = 227 << 10;
/// Parameters of one kernel or call.
const MAX_PARAM_BYTES: u64 = 4096;

/// Lowers a module whose module-scope variables were placed at `addresses`.
pub(crate) fn lower(text: &str, module: &Module<'_>, addresses: &HashMap<String, u64>) -> Result<Program> {
    let mut program = Program::new(text);
    program.files = module.files.iter().map(|&(i, f)| (i, f.to_owned())).collect();
    let mut scopes = Scopes::default();
    scopes.open();
    let mut shared = 0u64;
    for var in &module.vars {
        let symbol = match var.space {
            VarSpace::Shared if var.unsized_array || var.bytes == 0 => Symbol::DynamicShared,
            VarSpace::Shared => Symbol::Shared(place(&mut shared, var, MAX_SHARED_BYTES)?),
            _ => match addresses.get(var.name) {
                Some(&address) => Symbol::Global(address),
                None => return Err(FrontError::new(var.line, format!("`{}` has no storage", var.name))),
            },
        };
        scopes.define(var.name, symbol, var.line)?;
    }
    let mut index_of: HashMap<&str, usize> = HashMap::new();
    for function in &module.functions {
        let info = declare(function)?;
        // A declaration and its definition share one entry.
        if let Some(&i) = index_of.get(function.name) {
            if function.body.is_some() {
                program.functions[i] = info;
            }
            continue;
        }
        index_of.insert(function.name, program.functions.len());
        scopes.define(function.name, Symbol::Function(program.functions.len() as u32), function.line)?;
        program.functions.push(info);
    }
    // Shared variables of functions lie before those of entries, so that a function's offsets hold under every entry.
    for pass in [false, true] {
        for function in module.functions.iter().filter(|f| f.entry == pass) {
            let Some(body) = &function.body else { continue };
            let index = index_of[function.name];
            let mut own = shared;
            let mut lowerer = Lowerer::new(&mut program, &mut scopes, function, index as u32, &mut own);
            lowerer.body(body)?;
            if pass {
                program.functions[index].static_shared = own as u32;
            } else {
                shared = own;
            }
        }
    }
    program.finish();
    Ok(program)
}

/// Bytes of each module variable's initial value, with addresses of others filled in.
pub(crate) fn globals(module: &Module<'_>) -> Vec<GlobalVar> {
    let placed = module.vars.iter().filter(|v| matches!(v.space, VarSpace::Global | VarSpace::Const));
    placed
        .map(|var| {
            let mut bytes = Vec::new();
            let mut relocations = Vec::new();
            for init in &var.init {
                match *init {
                    Init::Bits(v, width) => bytes.extend_from_slice(&v.to_le_bytes()[..usize::from(width.min(8))]),
                    Init::Address(name, offset) => {
                        relocations.push((bytes.len(), name.to_owned(), offset));
                        bytes.extend_from_slice(&[0; 8]);
                    }
                }
            }
            GlobalVar { name: var.name.to_owned(), constant: var.space == VarSpace::Const, bytes: var.bytes, init: bytes, relocations }
        })
        .collect()
}

fn place(end: &mut u64, var: &Var<'_>, limit: u64) -> Result<u32> {
    let start = end.next_multiple_of(u64::from(var.align));
    *end = start + var.bytes;
    if *end > limit {
        return Err(FrontError::new(var.line, format!("`{}` ends at byte {}, the limit is {limit}", var.name, *end)));
    }
    Ok(start as u32)
}

fn slots(vars: &[Var<'_>], end: &mut u64) -> Result<Vec<Slot>> {
    vars.iter()
        .map(|v| Ok(Slot { offset: place(end, v, MAX_PARAM_BYTES)?, bytes: v.bytes as u32, align: v.align }))
        .collect()
}

fn declare(f: &Function<'_>) -> Result<FunctionInfo> {
    let mut end = 0;
    let params = slots(&f.params, &mut end)?;
    let param_bytes = end as u32;
    let rets = slots(&f.rets, &mut end)?;
    Ok(FunctionInfo {
        name: f.name.to_owned(),
        entry: f.entry,
        has_body: f.body.is_some(),
        params,
        param_bytes,
        rets,
        frame_param_bytes: end as u32,
        max_threads: f.max_threads,
        exact_threads: f.exact_threads,
        cluster: f.cluster,
        ..FunctionInfo::default()
    })
}

struct Lowerer<'p, 'a, 's> {
    program: &'p mut Program,
    scopes: &'p mut Scopes<'a>,
    function: &'p Function<'a>,
    index: u32,
    shared: &'s mut u64,
    local: u64,
    param: u64,
    loc: u32,
    locs: HashMap<Loc, u32>,
}

impl<'p, 'a: 'p, 's> Lowerer<'p, 'a, 's> {
    fn new(program: &'p mut Program, scopes: &'p mut Scopes<'a>, function: &'p Function<'a>, index: u32, shared: &'s mut u64) -> Self {
        let param = u64::from(program.functions[index as usize].frame_param_bytes);
        Self { program, scopes, function, index, shared, local: 0, param, loc: 0, locs: HashMap::new() }
    }

    fn body(&mut self, body: &[Stmt<'a>]) -> Result<()> {
        (self.scopes.rows32, self.scopes.rows64, self.scopes.rowsp) = (0, 0, 0);
        let start = self.program.code.len() as u32;
        self.scopes.open();
        let info = &self.program.functions[self.index as usize];
        let slots: Vec<Slot> = info.params.iter().chain(&info.rets).copied().collect();
        for (var, slot) in self.function.params.iter().chain(&self.function.rets).zip(slots) {
            self.scopes.define(var.name, Symbol::Param(slot.offset, slot.bytes), var.line)?;
        }
        for stmt in body {
            self.stmt(stmt)?;
        }
        // A body that runs off its end returns.
        self.push(Guard::ALWAYS, isa::Op::Control(isa::control::Control::Ret), self.function.line);
        self.close();
        self.scopes.unresolved()?;
        let info = &mut self.program.functions[self.index as usize];
        info.start = start;
        info.end = self.program.code.len() as u32;
        info.defined = true;
        (info.rows32, info.rows64, info.rowsp) = (self.scopes.rows32, self.scopes.rows64, self.scopes.rowsp);
        info.local_bytes = self.local.next_multiple_of(16) as u32;
        info.frame_param_bytes = self.param as u32;
        Ok(())
    }

    fn close(&mut self) {
        let Program { code, tables, .. } = &mut *self.program;
        self.scopes.close(&mut |fixup, pc| match fixup {
            Fixup::Branch(at) => {
                if let isa::Op::Control(isa::control::Control::Bra { target, .. }) = &mut code[at as usize].op {
                    *target = pc;
                }
            }
            Fixup::Table(table, entry) => tables[table as usize][entry as usize] = pc,
        });
    }

    fn push(&mut self, guard: Guard, op: isa::Op, line: u32) {
        self.program.code.push(Code { guard, op, watched: false });
        self.program.lines.push(line);
        self.program.locs.push(self.loc);
        self.program.touch_ends.push(self.program.touches.len() as u32);
    }

    fn stmt(&mut self, stmt: &Stmt<'a>) -> Result<()> {
        match stmt {
            Stmt::Open => self.scopes.open(),
            Stmt::Close => self.close(),
            Stmt::Loc(loc) => {
                let table = &mut self.program.loc_table;
                self.loc = *self.locs.entry(*loc).or_insert_with(|| {
                    table.push(*loc);
                    table.len() as u32
                });
            }
            Stmt::Label { name, line } => {
                let pc = self.program.code.len() as u32;
                self.scopes.label(name, pc, *line)?;
                self.program.labels.push((pc, (*name).to_owned()));
            }
            Stmt::Reg { bits, name, count, line } => match count {
                Some(n) => self.scopes.family(name, *bits, *n, *line)?,
                None => {
                    let symbol = self.scopes.new_register(*bits, *line)?;
                    self.scopes.define(name, symbol, *line)?;
                }
            },
            Stmt::Var(var) => {
                let symbol = match var.space {
                    VarSpace::Shared if var.unsized_array => Symbol::DynamicShared,
                    VarSpace::Shared => Symbol::Shared(place(self.shared, var, MAX_SHARED_BYTES)?),
                    VarSpace::Local => Symbol::Local(place(&mut self.local, var, MAX_LOCAL_BYTES)?),
                    VarSpace::Param => Symbol::Param(place(&mut self.param, var, 1 << 20)?, var.bytes as u32),
                    VarSpace::Global | VarSpace::Const => {
                        return Err(FrontError::new(var.line, format!("unimplemented: `{}` of module space inside a function", var.name)));
                    }
                };
                self.scopes.define(var.name, symbol, var.line)?;
            }
            Stmt::Targets { name, labels, line } => {
                let table = self.program.tables.len() as u32;
                self.program.tables.push(vec![0; labels.len()]);
                for (i, label) in labels.iter().enumerate() {
                    self.scopes.want_label(Fixup::Table(table, i as u32), label, *line);
                }
                self.scopes.define_table(name, table);
            }
            Stmt::Inst(inst) => self.inst(inst)?,
        }
        Ok(())
    }

    fn inst(&mut self, inst: &Inst<'a>) -> Result<()> {
        if self.program.code.len() >= MAX_CODE {
            return Err(FrontError::new(inst.line, format!("image has more than {MAX_CODE} instructions")));
        }
        let touched = self.program.touches.len();
        let mut ctx = Ctx {
            program: &mut *self.program,
            scopes: &mut *self.scopes,
            function: self.index,
            entry: self.function.entry,
            inst,
            used: vec![false; inst.mods.len()],
            arg: 0,
        };
        let guard = match inst.guard {
            None => Guard::ALWAYS,
            Some((name, negated)) => match ctx.scopes.find(name, inst.line)? {
                Some(Symbol::Pred(slot)) => Guard::on(slot, negated),
                _ => return Err(FrontError::new(inst.line, format!("guard `{name}` is not a predicate register"))),
            },
        };
        let op = isa::lower(&mut ctx)?;
        ctx.done()?;
        debug_assert!(touched <= self.program.touches.len());
        self.push(guard, op, inst.line);
        Ok(())
    }
}

/// What an instruction family sees while it lowers one instruction: modifiers and operands, each taken once. What is left over at
/// the end refuses the instruction.
pub(crate) struct Ctx<'p, 'a> {
    program: &'p mut Program,
    scopes: &'p mut Scopes<'a>,
    function: u32,
    /// Whether the code belongs to an entry rather than a function.
    pub entry: bool,
    pub inst: &'p Inst<'a>,
    used: Vec<bool>,
    arg: usize,
}

impl<'p, 'a> Ctx<'p, 'a> {
    /// The opcode without modifiers.
    pub fn name(&self) -> &'a str {
        self.inst.name
    }

    pub fn error<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(FrontError::new(self.inst.line, message))
    }

    /// Refuses the instruction by its full opcode.
    pub fn unimplemented<T>(&self) -> Result<T> {
        self.error(format!("unimplemented: {}", self.inst.opcode()))
    }

    fn done(&self) -> Result<()> {
        if let Some(i) = self.used.iter().position(|u| !u) {
            return self.error(format!("unimplemented: {} (modifier .{})", self.inst.opcode(), self.inst.mods[i]));
        }
        if self.arg < self.inst.args.len() {
            let (want, got) = (self.arg, self.inst.args.len());
            return self.error(format!("{} takes {want} operands, got {got}", self.inst.opcode()));
        }
        Ok(())
    }

    /// Takes modifier `name` if present.
    pub fn take(&mut self, name: &str) -> bool {
        match (0..self.used.len()).find(|&i| !self.used[i] && self.inst.mods[i] == name) {
            Some(i) => {
                self.used[i] = true;
                true
            }
            None => false,
        }
    }

    /// Whether modifier `name` is present and not yet taken.
    pub fn has(&self, name: &str) -> bool {
        (0..self.used.len()).any(|i| !self.used[i] && self.inst.mods[i] == name)
    }

    /// Takes the first modifier `f` accepts.
    pub fn take_map<T>(&mut self, f: impl Fn(&str) -> Option<T>) -> Option<T> {
        let (i, v) = (0..self.used.len()).filter(|&i| !self.used[i]).find_map(|i| f(self.inst.mods[i]).map(|v| (i, v)))?;
        self.used[i] = true;
        Some(v)
    }

    /// Takes one of `table`, which must be present.
    pub fn one_of<T: Copy>(&mut self, table: &[(&str, T)]) -> Result<T> {
        match self.take_map(|m| table.iter().find(|(n, _)| *n == m).map(|(_, v)| *v)) {
            Some(v) => Ok(v),
            None => self.unimplemented(),
        }
    }

    /// Takes the next type modifier.
    pub fn ty(&mut self) -> Result<Ty> {
        match self.take_map(Ty::parse) {
            Some(ty) => Ok(ty),
            None => self.unimplemented(),
        }
    }

    /// Takes one type modifier, which must be among `allowed`.
    pub fn ty_of(&mut self, allowed: &[Ty]) -> Result<Ty> {
        let ty = self.ty()?;
        if allowed.contains(&ty) { Ok(ty) } else { self.unimplemented() }
    }

    /// The next operand, as syntax.
    pub fn next(&mut self) -> Result<&'p Arg<'a>> {
        match self.inst.args.get(self.arg) {
            Some(arg) => {
                self.arg += 1;
                Ok(arg)
            }
            None => self.error(format!("{} takes more than {} operands", self.inst.opcode(), self.inst.args.len())),
        }
    }

    /// Operands not yet taken.
    pub fn left(&self) -> usize {
        self.inst.args.len() - self.arg
    }

    pub fn peek(&self) -> Option<&'p Arg<'a>> {
        self.inst.args.get(self.arg)
    }

    pub fn symbol(&mut self, name: &'a str) -> Result<Option<Symbol>> {
        self.scopes.find(name, self.inst.line)
    }

    fn touch(&mut self, reg: Reg, write: bool) {
        if let Reg::W(slot, _) = reg {
            self.program.touches.push(Touch { slot, write });
        }
    }

    /// `want` bits of the instruction against the register's; 0 accepts any width.
    fn check_width(&self, name: &str, want: u8, got: u8) -> Result<()> {
        if want != 0 && want != got {
            return self.error(format!("{}: `{name}` has {got} bits, the instruction needs {want}", self.inst.opcode()));
        }
        Ok(())
    }

    /// A register to write. `bits` of 0 accepts any width.
    pub fn dst_arg(&mut self, arg: &Arg<'a>, bits: u8) -> Result<Reg> {
        match *arg {
            Arg::Name("_", None) => Ok(Reg::Sink),
            Arg::Name(name, None) => match self.symbol(name)? {
                Some(Symbol::Reg(reg, have)) => {
                    self.check_width(name, bits, have)?;
                    self.touch(reg, true);
                    Ok(reg)
                }
                _ => self.error(format!("`{name}` is not a register")),
            },
            _ => self.error(format!("{}: `{arg}` cannot be written", self.inst.opcode())),
        }
    }

    pub fn dst(&mut self, bits: u8) -> Result<Reg> {
        let arg = self.next()?;
        self.dst_arg(arg, bits)
    }

    /// A value to read. `bits` of 0 accepts any width.
    pub fn src_arg(&mut self, arg: &Arg<'a>, bits: u8) -> Result<Src> {
        match *arg {
            Arg::Int(v) => Ok(Src::Imm(v)),
            Arg::F32(v) if bits == 64 => Ok(Src::Imm(f64::from(f32::from_bits(v)).to_bits())),
            Arg::F32(v) => Ok(Src::Imm(v.into())),
            Arg::F64(v) if bits == 32 => Ok(Src::Imm((f64::from_bits(v) as f32).to_bits().into())),
            Arg::F64(v) => Ok(Src::Imm(v)),
            Arg::Name("WARP_SZ", None) => Ok(Src::Imm(32)),
            Arg::Name(name, part) => {
                if let Some(special) = Special::parse(name, part) {
                    return Ok(Src::Special(special));
                }
                if part.is_some() {
                    return self.error(format!("unimplemented: special register `{arg}`"));
                }
                match self.symbol(name)? {
                    Some(Symbol::Reg(reg, have)) => {
                        self.check_width(name, bits, have)?;
                        self.touch(reg, false);
                        Ok(match reg {
                            Reg::W(slot, _) => Src::W(slot),
                            Reg::D(slot) => Src::D(slot),
                            Reg::Sink => Src::Imm(0),
                        })
                    }
                    Some(symbol) => self.address_of(symbol, name, 0),
                    None if name.starts_with('%') => self.error(format!("unimplemented: special register `{arg}`")),
                    None => self.error(format!("`{name}` is not declared")),
                }
            }
            Arg::NameOffset(name, offset) => match self.symbol(name)? {
                Some(symbol) => self.address_of(symbol, name, offset),
                None => self.error(format!("`{name}` is not declared")),
            },
            _ => self.error(format!("{}: `{arg}` cannot be read as a value", self.inst.opcode())),
        }
    }

    pub fn src(&mut self, bits: u8) -> Result<Src> {
        let arg = self.next()?;
        self.src_arg(arg, bits)
    }

    /// The address of a variable, as a value.
    fn address_of(&self, symbol: Symbol, name: &str, offset: i64) -> Result<Src> {
        let add = |base: u32| u32::try_from(i64::from(base) + offset);
        let small = |base: u32| add(base).or_else(|_| self.error(format!("`{name}{offset:+}` is not an address")));
        Ok(match symbol {
            Symbol::Shared(at) => Src::Special(Special::SharedVar(small(at)?)),
            Symbol::DynamicShared => match i32::try_from(offset) {
                Ok(offset) => Src::Special(Special::DynamicShared(offset)),
                Err(_) => return self.error(format!("`{name}{offset:+}` is not an address")),
            },
            Symbol::Local(at) => Src::Special(Special::LocalVar(small(at)?)),
            Symbol::Param(at, _) => Src::Imm(small(at)?.into()),
            Symbol::Global(at) => Src::Imm(at.wrapping_add_signed(offset)),
            Symbol::Pred(_) => return self.error(format!("{}: `{name}` is a predicate", self.inst.opcode())),
            Symbol::Reg(..) => return self.error(format!("{}: `{name}{offset:+}` is not a value", self.inst.opcode())),
            Symbol::Function(_) => return self.error(format!("unimplemented: address of function `{name}`")),
        })
    }

    /// A predicate register to write, `_` allowed.
    pub fn pred_dst_arg(&mut self, arg: &Arg<'a>) -> Result<Option<u32>> {
        match *arg {
            Arg::Name("_", None) => Ok(None),
            Arg::Name(name, None) => match self.symbol(name)? {
                Some(Symbol::Pred(slot)) => Ok(Some(slot)),
                _ => self.error(format!("`{name}` is not a predicate register")),
            },
            _ => self.error(format!("{}: `{arg}` is not a predicate register", self.inst.opcode())),
        }
    }

    pub fn pred_dst(&mut self) -> Result<Option<u32>> {
        let arg = self.next()?;
        self.pred_dst_arg(arg)
    }

    pub fn pred_src(&mut self) -> Result<PSrc> {
        let arg = self.next()?;
        self.pred_src_arg(arg)
    }

    pub fn pred_src_arg(&mut self, arg: &Arg<'a>) -> Result<PSrc> {
        match arg {
            Arg::Int(v) => Ok(PSrc::Const(*v != 0)),
            Arg::Not(inner) => match self.pred_src_arg(inner)? {
                PSrc::Reg { slot, negated } => Ok(PSrc::Reg { slot, negated: !negated }),
                PSrc::Const(v) => Ok(PSrc::Const(!v)),
            },
            Arg::Name(name, None) => match self.symbol(name)? {
                Some(Symbol::Pred(slot)) => Ok(PSrc::Reg { slot, negated: false }),
                _ => self.error(format!("`{name}` is not a predicate register")),
            },
            _ => self.error(format!("{}: `{arg}` is not a predicate", self.inst.opcode())),
        }
    }

    /// An immediate integer.
    pub fn imm(&mut self) -> Result<i64> {
        match self.next()? {
            Arg::Int(v) => Ok(*v as i64),
            other => self.error(format!("{}: `{other}` must be an immediate", self.inst.opcode())),
        }
    }

    /// An immediate integer in a range.
    pub fn imm_in(&mut self, range: std::ops::RangeInclusive<i64>) -> Result<i64> {
        let v = self.imm()?;
        if range.contains(&v) {
            return Ok(v);
        }
        self.error(format!("{}: immediate is {v}, must be in {}..={}", self.inst.opcode(), range.start(), range.end()))
    }

    /// `[base+offset]`.
    pub fn mem(&mut self) -> Result<Mem> {
        match self.next()? {
            Arg::Mem { base, offset, coords: None } => self.mem_base(*base, *offset),
            other => self.error(format!("{}: `{other}` must be an address in brackets", self.inst.opcode())),
        }
    }

    /// `[map, {coordinates}]`.
    pub fn tensor_mem(&mut self) -> Result<(Mem, Vec<Src>)> {
        match self.next()? {
            Arg::Mem { base, offset, coords: Some(coords) } => {
                let mem = self.mem_base(*base, *offset)?;
                let coords = coords.iter().map(|c| self.src_arg(c, 32)).collect::<Result<_>>()?;
                Ok((mem, coords))
            }
            other => self.error(format!("{}: `{other}` must be a tensor map with coordinates", self.inst.opcode())),
        }
    }

    pub fn mem_base(&mut self, base: MemBase<'a>, offset: i64) -> Result<Mem> {
        let base = match base {
            MemBase::Int(v) => Src::Imm(v),
            MemBase::Name(name) => match self.symbol(name)? {
                Some(Symbol::Reg(..)) => self.src_arg(&Arg::Name(name, None), 0)?,
                Some(symbol) => self.address_of(symbol, name, 0)?,
                None => return self.error(format!("`{name}` is not declared")),
            },
        };
        Ok(Mem { base, offset })
    }

    /// Items of a `{...}` operand; a bare operand counts as one item.
    pub fn vector(&mut self) -> Result<&'p [Arg<'a>]> {
        Ok(match self.next()? {
            Arg::Vector(items) => items,
            single => std::slice::from_ref(single),
        })
    }

    pub fn dst_vector(&mut self, n: usize, bits: u8) -> Result<Vec<Reg>> {
        let items = self.vector()?;
        if items.len() != n {
            return self.error(format!("{}: {} registers given, {n} needed", self.inst.opcode(), items.len()));
        }
        items.iter().map(|a| self.dst_arg(a, bits)).collect()
    }

    pub fn src_vector(&mut self, n: usize, bits: u8) -> Result<Vec<Src>> {
        let items = self.vector()?;
        if items.len() != n {
            return self.error(format!("{}: {} registers given, {n} needed", self.inst.opcode(), items.len()));
        }
        items.iter().map(|a| self.src_arg(a, bits)).collect()
    }

    /// Registers both read and written, such as accumulators.
    pub fn inout_vector(&mut self, n: usize, bits: u8) -> Result<Vec<Reg>> {
        let regs = self.dst_vector(n, bits)?;
        for &reg in &regs {
            self.touch(reg, false);
        }
        Ok(regs)
    }

    /// Resolves a branch target once its label is known.
    pub fn want_label(&mut self, name: &'a str) {
        let pc = self.program.code.len() as u32;
        self.scopes.want_label(Fixup::Branch(pc), name, self.inst.line);
    }

    pub fn table(&self, name: &str) -> Option<u32> {
        self.scopes.table(name)
    }

    pub fn function_info(&self, index: u32) -> &FunctionInfo {
        &self.program.functions[index as usize]
    }

    /// What this function needs from the machine, noted for the launch.
    pub fn uses(&mut self) -> &mut crate::module::Uses {
        &mut self.program.functions[self.function as usize].uses
    }

    /// Registers a wgmma works on, watched by the register detector.
    pub fn watch(&mut self, regs: impl Iterator<Item = u32>) {
        let watched = &mut self.program.functions[self.function as usize].watched;
        watched.extend(regs);
    }
}
