//! The syntax tree: what the text says, before any of it means anything.

use std::fmt;

#[derive(Debug, Default)]
pub(crate) struct Module<'a> {
    pub files: Vec<(u32, &'a str)>,
    pub vars: Vec<Var<'a>>,
    pub functions: Vec<Function<'a>>,
}

/// State space of a declared variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VarSpace {
    Global,
    Const,
    Shared,
    Local,
    Param,
}

/// A variable: module scope, function scope, or parameter.
#[derive(Clone, Debug)]
pub(crate) struct Var<'a> {
    pub space: VarSpace,
    pub name: &'a str,
    pub align: u32,
    /// Bytes in all; 0 for an array of unknown length.
    pub bytes: u64,
    pub unsized_array: bool,
    pub init: Vec<Init<'a>>,
    pub line: u32,
}

/// One initialiser element.
#[derive(Clone, Debug)]
pub(crate) enum Init<'a> {
    /// Value and its width in bytes.
    Bits(u64, u8),
    /// Address of a variable plus an offset, 8 bytes.
    Address(&'a str, i64),
}

#[derive(Debug)]
pub(crate) struct Function<'a> {
    pub name: &'a str,
    pub entry: bool,
    pub rets: Vec<Var<'a>>,
    pub params: Vec<Var<'a>>,
    /// `None` for a declaration.
    pub body: Option<Vec<Stmt<'a>>>,
    pub max_threads: Option<[u32; 3]>,
    pub exact_threads: Option<[u32; 3]>,
    pub cluster: Option<[u32; 3]>,
    pub line: u32,
}

#[derive(Debug)]
pub(crate) enum Stmt<'a> {
    Reg { bits: RegBits, name: &'a str, count: Option<u64>, line: u32 },
    Var(Var<'a>),
    Label { name: &'a str, line: u32 },
    Open,
    Close,
    Loc(Loc),
    Targets { name: &'a str, labels: Vec<&'a str>, line: u32 },
    Inst(Inst<'a>),
}

/// `.loc file line column`, with the position it was inlined at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) struct Loc {
    pub at: (u32, u32, u32),
    pub inlined_at: Option<(u32, u32, u32)>,
}

/// What a `.reg` declaration says about width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RegBits {
    Pred,
    Bits(u8),
}

#[derive(Debug)]
pub(crate) struct Inst<'a> {
    /// Predicate register and whether it is negated.
    pub guard: Option<(&'a str, bool)>,
    pub name: &'a str,
    pub mods: Vec<&'a str>,
    pub args: Vec<Arg<'a>>,
    pub line: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Arg<'a> {
    /// Register, variable, label, function or special register (`%tid.x`).
    Name(&'a str, Option<&'a str>),
    /// `name+offset` outside brackets: the address of a variable.
    NameOffset(&'a str, i64),
    Int(u64),
    F32(u32),
    F64(u64),
    /// `[base+offset]`, or `[base, {coordinates}]` with `coords`.
    Mem {
        base: MemBase<'a>,
        offset: i64,
        coords: Option<Vec<Arg<'a>>>,
    },
    Vector(Vec<Arg<'a>>),
    /// `d|p`.
    Pair(Box<Arg<'a>>, Box<Arg<'a>>),
    Not(Box<Arg<'a>>),
    /// `(a, b)` of a call.
    List(Vec<Arg<'a>>),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum MemBase<'a> {
    Name(&'a str),
    Int(u64),
}

impl fmt::Display for Arg<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, items: &[Arg<'_>]| {
            for (i, item) in items.iter().enumerate() {
                if i == 4 && items.len() > 6 {
                    return write!(f, ", ... {} in all", items.len());
                }
                write!(f, "{}{item}", if i > 0 { ", " } else { "" })?;
            }
            Ok(())
        };
        match self {
            Arg::Name(n, None) => f.write_str(n),
            Arg::Name(n, Some(part)) => write!(f, "{n}.{part}"),
            Arg::NameOffset(n, o) => write!(f, "{n}{o:+}"),
            Arg::Int(v) if *v >= 1 << 63 => write!(f, "{}", *v as i64),
            Arg::Int(v) => write!(f, "{v}"),
            Arg::F32(v) => write!(f, "0f{v:08X}"),
            Arg::F64(v) => write!(f, "0d{v:016X}"),
            Arg::Mem { base, offset, coords } => {
                match base {
                    MemBase::Name(n) => write!(f, "[{n}")?,
                    MemBase::Int(v) => write!(f, "[{v}")?,
                }
                if *offset != 0 {
                    write!(f, "{offset:+}")?;
                }
                if let Some(coords) = coords {
                    f.write_str(", {")?;
                    list(f, coords)?;
                    f.write_str("}")?;
                }
                f.write_str("]")
            }
            Arg::Vector(v) => {
                f.write_str("{")?;
                list(f, v)?;
                f.write_str("}")
            }
            Arg::Pair(a, b) => write!(f, "{a}|{b}"),
            Arg::Not(a) => write!(f, "!{a}"),
            Arg::List(v) => {
                f.write_str("(")?;
                list(f, v)?;
                f.write_str(")")
            }
        }
    }
}

impl Inst<'_> {
    /// Opcode with its modifiers, as written.
    pub fn opcode(&self) -> String {
        let mut s = self.name.to_owned();
        for m in &self.mods {
            s.push('.');
            s.push_str(m);
        }
        s
    }
}

impl fmt::Display for Inst<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((p, negated)) = self.guard {
            write!(f, "@{}{p} ", if negated { "!" } else { "" })?;
        }
        f.write_str(&self.opcode())?;
        for (i, arg) in self.args.iter().enumerate() {
            write!(f, "{}{arg}", if i > 0 { ", " } else { " " })?;
        }
        f.write_str(";")
    }
}
