//! Syntax tree to program: layout of variables, register rows, labels, and one [`Op`](crate::isa::Op) per instruction.

use super::FrontError;
use super::ast::{Function, Init, Inst, Loc, Module, Stmt, Var, VarSpace};
use super::ctx::Ctx;
use super::scope::{Fixup, Scopes, Symbol};
use crate::isa::{self, Code, Guard};
use crate::module::{FunctionInfo, GlobalVar, Program, Slot};
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
            VarSpace::Shared if var.unsized_array || var.bytes == 0 => {
                program.dynamic_align = program.dynamic_align.max(var.align);
                Symbol::DynamicShared
            }
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
    vars.iter().map(|v| Ok(Slot { offset: place(end, v, MAX_PARAM_BYTES)?, bytes: v.bytes as u32, align: v.align })).collect()
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
        let names = std::mem::take(&mut self.scopes.names);
        let info = &mut self.program.functions[self.index as usize];
        info.start = start;
        info.end = self.program.code.len() as u32;
        info.defined = true;
        (info.rows32, info.rows64, info.rowsp) = (self.scopes.rows32, self.scopes.rows64, self.scopes.rowsp);
        info.local_bytes = self.local.next_multiple_of(16) as u32;
        info.frame_param_bytes = self.param as u32;
        self.program.finish(self.index as usize, |row| names.get(&row).map_or_else(String::new, |name| (*name).to_owned()));
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
        self.program.code.push(Code { guard, op, watched: false, unsure: false });
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
                    VarSpace::Shared if var.unsized_array => {
                        self.program.dynamic_align = self.program.dynamic_align.max(var.align);
                        Symbol::DynamicShared
                    }
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
        let mut ctx = Ctx::new(&mut *self.program, &mut *self.scopes, self.index, inst);
        let guard = match inst.guard {
            None => Guard::ALWAYS,
            Some((name, negated)) => match ctx.symbol(name)? {
                Some(Symbol::Pred(slot)) => Guard::on(slot, negated),
                _ => return Err(FrontError::new(inst.line, format!("guard `{name}` is not a predicate register"))),
            },
        };
        let op = isa::lower(&mut ctx)?;
        ctx.done()?;
        self.push(guard, op, inst.line);
        Ok(())
    }
}
