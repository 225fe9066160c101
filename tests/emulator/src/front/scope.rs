//! Names in nested scopes: registers, variables, labels and branch tables of one function.

use super::FrontError;
use super::ast::RegBits;
use crate::isa::ty::Reg;
use crate::module::Row;
use std::collections::HashMap;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Symbol {
    Reg(Reg, u8),
    Pred(u32),
    /// Static shared variable: offset in the window.
    Shared(u32),
    DynamicShared,
    /// Local variable: offset in the frame.
    Local(u32),
    /// Parameter space of this activation: offset and bytes.
    Param(u32, u32),
    /// Module variable: device address.
    Global(u64),
    Function(u32),
}

#[derive(Debug, Default)]
struct Scope<'a> {
    symbols: HashMap<&'a str, Symbol>,
    /// `%r<50>`: prefix to width and count.
    families: HashMap<&'a str, (RegBits, u64)>,
    labels: HashMap<&'a str, u32>,
    /// Code positions that wait for a label.
    fixups: Vec<(Fixup, &'a str, u32)>,
    tables: HashMap<&'a str, u32>,
}

/// A place in the code that names a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fixup {
    /// The target of the branch at this PC.
    Branch(u32),
    /// Entry `.1` of branch table `.0`.
    Table(u32, u32),
}

/// Registers one declaration may announce: rows are made for those that are named.
const MAX_FAMILY: u64 = 1 << 24;
/// Registers a function may name; far above what a compiler emits.
const MAX_REGISTERS: u32 = 1 << 16;

#[derive(Debug, Default)]
pub(crate) struct Scopes<'a> {
    stack: Vec<Scope<'a>>,
    pub rows32: u32,
    pub rows64: u32,
    pub rowsp: u32,
    /// The registers of the function.
    pub names: HashMap<Row, &'a str>,
}

impl<'a> Scopes<'a> {
    pub fn open(&mut self) {
        self.stack.push(Scope::default());
    }

    /// Closes the innermost scope. Resolved labels go to `patch`; the rest wait in the scope outside.
    pub fn close(&mut self, patch: &mut dyn FnMut(Fixup, u32)) {
        let Some(scope) = self.stack.pop() else { return };
        for (fixup, name, line) in scope.fixups {
            if let Some(&pc) = scope.labels.get(name) {
                patch(fixup, pc);
            } else if let Some(outer) = self.stack.last_mut() {
                outer.fixups.push((fixup, name, line));
            }
        }
    }

    /// A label that was named inside a function and defined nowhere in it. Call after the function's scope is closed.
    pub fn unresolved(&mut self) -> Result<(), FrontError> {
        match self.top().fixups.first() {
            Some(&(_, name, line)) => Err(FrontError::new(line, format!("label `{name}` is not defined"))),
            None => Ok(()),
        }
    }

    fn top(&mut self) -> &mut Scope<'a> {
        if self.stack.is_empty() {
            self.open();
        }
        self.stack.last_mut().expect("a scope is open")
    }

    pub fn define(&mut self, name: &'a str, symbol: Symbol, line: u32) -> Result<(), FrontError> {
        self.note(name, symbol);
        match self.top().symbols.insert(name, symbol) {
            None => Ok(()),
            Some(_) => Err(FrontError::new(line, format!("`{name}` is declared twice in one scope"))),
        }
    }

    /// Keeps the name of a register.
    fn note(&mut self, name: &'a str, symbol: Symbol) {
        let row = match symbol {
            Symbol::Reg(reg, _) => Row::of(reg),
            Symbol::Pred(slot) => Some(Row::P(slot)),
            _ => None,
        };
        self.names.extend(row.map(|row| (row, name)));
    }

    pub fn family(&mut self, prefix: &'a str, bits: RegBits, count: u64, line: u32) -> Result<(), FrontError> {
        if count > MAX_FAMILY {
            return Err(FrontError::new(line, format!("`{prefix}<{count}>` declares {count} registers, must be at most {MAX_FAMILY}")));
        }
        self.top().families.insert(prefix, (bits, count));
        Ok(())
    }

    pub fn label(&mut self, name: &'a str, pc: u32, line: u32) -> Result<(), FrontError> {
        match self.top().labels.insert(name, pc) {
            None => Ok(()),
            Some(_) => Err(FrontError::new(line, format!("label `{name}` is defined twice in one scope"))),
        }
    }

    pub fn want_label(&mut self, fixup: Fixup, name: &'a str, line: u32) {
        self.top().fixups.push((fixup, name, line));
    }

    pub fn define_table(&mut self, name: &'a str, index: u32) {
        self.top().tables.insert(name, index);
    }

    pub fn table(&self, name: &str) -> Option<u32> {
        self.stack.iter().rev().find_map(|s| s.tables.get(name).copied())
    }

    /// A fresh register row.
    pub fn new_register(&mut self, bits: RegBits, line: u32) -> Result<Symbol, FrontError> {
        if self.rows32 + self.rows64 + self.rowsp >= MAX_REGISTERS {
            return Err(FrontError::new(line, format!("a function names more than {MAX_REGISTERS} registers")));
        }
        let take = |n: &mut u32| {
            *n += 1;
            *n - 1
        };
        Ok(match bits {
            RegBits::Pred => Symbol::Pred(take(&mut self.rowsp)),
            RegBits::Bits(64) => Symbol::Reg(Reg::D(take(&mut self.rows64)), 64),
            RegBits::Bits(n) => Symbol::Reg(Reg::W(take(&mut self.rows32), n), n),
        })
    }

    /// What `name` means here. Members of a register family get their row at first use.
    pub fn find(&mut self, name: &'a str, line: u32) -> Result<Option<Symbol>, FrontError> {
        let prefix = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number: Option<u64> = name[prefix.len()..].parse().ok();
        for i in (0..self.stack.len()).rev() {
            if let Some(&symbol) = self.stack[i].symbols.get(name) {
                return Ok(Some(symbol));
            }
            if let (Some(&(bits, count)), Some(n)) = (self.stack[i].families.get(prefix), number)
                && n < count
            {
                let symbol = self.new_register(bits, line)?;
                self.note(name, symbol);
                self.stack[i].symbols.insert(name, symbol);
                return Ok(Some(symbol));
            }
        }
        Ok(None)
    }
}
