//! The view an instruction family has of one instruction while it lowers it.

use super::FrontError;
use super::ast::{Arg, Inst, MemBase};
use super::scope::{Fixup, Scopes, Symbol};
use crate::isa::Mem;
use crate::isa::ty::{PSrc, Reg, Special, Src, Ty};
use crate::module::{FunctionInfo, Program, Row, Touch, Uses};

type Result<T> = std::result::Result<T, FrontError>;

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
    pub fn new(program: &'p mut Program, scopes: &'p mut Scopes<'a>, function: u32, inst: &'p Inst<'a>) -> Self {
        let entry = program.functions[function as usize].entry;
        Self { program, scopes, function, entry, inst, used: vec![false; inst.mods.len()], arg: 0 }
    }

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

    /// Refuses what nobody took.
    pub fn done(&self) -> Result<()> {
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
        self.program.touches.extend(Row::of(reg).map(|row| Touch { row, write }));
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
                Some(Symbol::Pred(slot)) => {
                    self.program.touches.push(Touch { row: Row::P(slot), write: true });
                    Ok(Some(slot))
                }
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
                Some(Symbol::Pred(slot)) => {
                    self.program.touches.push(Touch { row: Row::P(slot), write: false });
                    Ok(PSrc::Reg { slot, negated: false })
                }
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
    pub fn uses(&mut self) -> &mut Uses {
        &mut self.program.functions[self.function as usize].uses
    }

    /// Registers a wgmma works on, watched by the register detector.
    pub fn watch(&mut self, regs: impl Iterator<Item = u32>) {
        let watched = &mut self.program.functions[self.function as usize].watched;
        watched.extend(regs);
    }
}
