//! Tokens to syntax tree. Recursion is bounded: only operands nest, and only [`MAX_NESTING`] deep.

mod body;

use super::FrontError;
use super::ast::{Function, Init, Module, Var, VarSpace};
use super::lex::{Tok, Token};

type Result<T> = std::result::Result<T, FrontError>;

/// Deepest nesting of operands (`[a, {b}]` is 2) and of scopes.
const MAX_NESTING: usize = 64;
/// Largest variable a module may declare.
const MAX_VAR_BYTES: u64 = 1 << 30;

pub(crate) struct Parser<'a> {
    toks: Vec<Token<'a>>,
    pos: usize,
}

/// Bytes of a fundamental type name, for declarations.
fn type_bytes(name: &str) -> Option<u64> {
    Some(match name {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        "b128" => 16,
        _ => return None,
    })
}

impl<'a> Parser<'a> {
    pub fn new(toks: Vec<Token<'a>>) -> Self {
        Self { toks, pos: 0 }
    }

    fn peek(&self) -> Tok<'a> {
        self.toks[self.pos.min(self.toks.len() - 1)].tok
    }

    fn line(&self) -> u32 {
        self.toks[self.pos.min(self.toks.len() - 1)].line
    }

    fn next(&mut self) -> Tok<'a> {
        let tok = self.peek();
        self.pos += 1;
        tok
    }

    fn error<T>(&self, want: &str) -> Result<T> {
        let got = match self.peek() {
            Tok::Word(w) => format!("`{w}`"),
            Tok::Dot(w) => format!("`.{w}`"),
            Tok::Punct(c) => format!("`{}`", char::from(c)),
            Tok::End => "the end of the text".to_owned(),
            Tok::Str(_) => "a string".to_owned(),
            Tok::Int(_) | Tok::F32(_) | Tok::F64(_) => "a number".to_owned(),
        };
        Err(FrontError::new(self.line(), format!("expected {want}, found {got}")))
    }

    fn eat(&mut self, c: u8) -> bool {
        let hit = self.peek() == Tok::Punct(c);
        self.pos += usize::from(hit);
        hit
    }

    fn want(&mut self, c: u8) -> Result<()> {
        if self.eat(c) { Ok(()) } else { self.error(&format!("`{}`", char::from(c))) }
    }

    fn word(&mut self) -> Result<&'a str> {
        match self.peek() {
            Tok::Word(w) => {
                self.pos += 1;
                Ok(w)
            }
            _ => self.error("a name"),
        }
    }

    fn int(&mut self) -> Result<u64> {
        let negative = self.eat(b'-');
        match self.peek() {
            Tok::Int(v) => {
                self.pos += 1;
                Ok(if negative { v.wrapping_neg() } else { v })
            }
            _ => self.error("an integer"),
        }
    }

    fn small(&mut self, what: &str) -> Result<u32> {
        let line = self.line();
        let v = self.int()?;
        u32::try_from(v).map_err(|_| FrontError::new(line, format!("{what} is {v}, must fit 32 bits")))
    }

    /// Skips to after the `;`, or over one balanced `{...}`.
    fn skip_braces(&mut self) -> Result<()> {
        self.want(b'{')?;
        let mut depth = 1usize;
        while depth > 0 {
            match self.next() {
                Tok::Punct(b'{') => depth += 1,
                Tok::Punct(b'}') => depth -= 1,
                Tok::End => return self.error("`}`"),
                _ => {}
            }
        }
        Ok(())
    }

    pub fn module(mut self) -> Result<Module<'a>> {
        let mut module = Module::default();
        let (mut version, mut target) = (false, false);
        loop {
            match self.peek() {
                Tok::End => break,
                Tok::Punct(b';') => {
                    self.pos += 1;
                }
                Tok::Dot("version") => {
                    self.pos += 1;
                    match self.next() {
                        Tok::F64(v) if (6.0..10.0).contains(&f64::from_bits(v)) => version = true,
                        Tok::Int(v) if (6..10).contains(&v) => version = true,
                        _ => return Err(FrontError::new(self.line(), "PTX version must be in 6.0..10.0")),
                    }
                }
                Tok::Dot("target") => {
                    self.pos += 1;
                    let line = self.line();
                    loop {
                        match self.word()? {
                            "sm_90a" | "sm_90" | "sm_80" | "sm_86" | "sm_89" | "sm_75" | "sm_70" | "debug" | "texmode_independent" => {}
                            other => return Err(FrontError::new(line, format!("target {other} does not run here; this is sm_90a"))),
                        }
                        if !self.eat(b',') {
                            break;
                        }
                    }
                    target = true;
                }
                Tok::Dot("address_size") => {
                    self.pos += 1;
                    let line = self.line();
                    let size = self.int()?;
                    if size != 64 {
                        return Err(FrontError::new(line, format!("address size is {size}, must be 64")));
                    }
                }
                Tok::Dot("file") => {
                    let file = self.file()?;
                    module.files.push(file);
                }
                Tok::Dot("section") => {
                    self.pos += 2;
                    self.skip_braces()?;
                }
                Tok::Dot("loc") => {
                    self.loc()?;
                }
                _ => self.definition(&mut module)?,
            }
        }
        if !version || !target {
            return Err(FrontError::new(1, "image has no .version and .target"));
        }
        Ok(module)
    }

    fn file(&mut self) -> Result<(u32, &'a str)> {
        self.pos += 1;
        let index = self.small("file index")?;
        let Tok::Str(name) = self.peek() else { return self.error("a file name") };
        self.pos += 1;
        while self.eat(b',') {
            self.int()?;
        }
        Ok((index, name))
    }

    /// A module-scope variable or a function, with its linkage words.
    fn definition(&mut self, module: &mut Module<'a>) -> Result<()> {
        loop {
            match self.peek() {
                Tok::Dot("visible" | "extern" | "weak" | "common") => self.pos += 1,
                Tok::Dot("entry") => {
                    self.pos += 1;
                    let f = self.function(true)?;
                    module.functions.push(f);
                    return Ok(());
                }
                Tok::Dot("func") => {
                    self.pos += 1;
                    let f = self.function(false)?;
                    module.functions.push(f);
                    return Ok(());
                }
                Tok::Dot("global" | "const" | "shared") => {
                    self.vars(&mut |v| module.vars.push(v))?;
                    return Ok(());
                }
                _ => return self.error("a variable or function definition"),
            }
        }
    }

    fn function(&mut self, entry: bool) -> Result<Function<'a>> {
        let mut attrs = Vec::new();
        self.attributes(&mut attrs)?;
        let rets = if !entry && self.peek() == Tok::Punct(b'(') { self.params()? } else { Vec::new() };
        let line = self.line();
        let name = self.word()?;
        let params = if self.peek() == Tok::Punct(b'(') { self.params()? } else { Vec::new() };
        self.attributes(&mut attrs)?;
        let body = if self.eat(b';') { None } else { Some(self.body()?) };
        let mut f = Function { name, entry, rets, params, body, max_threads: None, exact_threads: None, cluster: None, line };
        for (name, dims) in attrs {
            match name {
                "maxntid" => f.max_threads = Some(dims),
                "reqntid" => f.exact_threads = Some(dims),
                "reqnctapercluster" => f.cluster = Some(dims),
                _ => {}
            }
        }
        Ok(f)
    }

    /// Performance directives between a function's head and its body. Those without meaning here are read over by name.
    fn attributes(&mut self, out: &mut Vec<(&'a str, [u32; 3])>) -> Result<()> {
        loop {
            match self.peek() {
                Tok::Dot(
                    name @ ("maxntid" | "reqntid" | "reqnctapercluster" | "minnctapersm" | "maxnctapersm" | "maxnreg" | "maxclusterrank"),
                ) => {
                    self.pos += 1;
                    let mut dims = [1; 3];
                    dims[0] = self.small(name)?;
                    for dim in &mut dims[1..] {
                        if self.eat(b',') {
                            *dim = self.small(name)?;
                        }
                    }
                    out.push((name, dims));
                }
                Tok::Dot("explicitcluster" | "noreturn") => self.pos += 1,
                Tok::Dot("pragma") => {
                    while !self.eat(b';') {
                        if self.next() == Tok::End {
                            return self.error("`;`");
                        }
                    }
                }
                _ => return Ok(()),
            }
        }
    }

    fn params(&mut self) -> Result<Vec<Var<'a>>> {
        self.want(b'(')?;
        let mut out = Vec::new();
        if self.eat(b')') {
            return Ok(out);
        }
        loop {
            if self.peek() != Tok::Dot("param") {
                return self.error("`.param`");
            }
            out.push(self.var()?);
            if self.eat(b')') {
                return Ok(out);
            }
            self.want(b',')?;
        }
    }

    /// `.space .align n .type name[n], name2 = {...};`
    fn vars(&mut self, push: &mut dyn FnMut(Var<'a>)) -> Result<()> {
        let first = self.pos;
        loop {
            let at = self.pos;
            if at != first {
                return self.error("`;`");
            }
            push(self.var()?);
            if self.eat(b';') {
                return Ok(());
            }
        }
    }

    fn var(&mut self) -> Result<Var<'a>> {
        let line = self.line();
        let space = match self.next() {
            Tok::Dot("global") => VarSpace::Global,
            Tok::Dot("const") => VarSpace::Const,
            Tok::Dot("shared" | "shared::cta") => VarSpace::Shared,
            Tok::Dot("local") => VarSpace::Local,
            Tok::Dot("param") => VarSpace::Param,
            _ => {
                self.pos -= 1;
                return self.error("a state space");
            }
        };
        let mut align = None;
        let mut vector = 1;
        let elem = loop {
            match self.next() {
                Tok::Dot("align") => align = Some(self.small("alignment")?),
                Tok::Dot("v2") => vector = 2,
                Tok::Dot("v4") => vector = 4,
                Tok::Dot("ptr" | "global" | "const" | "shared" | "local" | "param") => {}
                Tok::Dot(ty) => match type_bytes(ty) {
                    Some(bytes) => {
                        // `.param .u64 .ptr .global .align 4 name`: the pointee's alignment, not the parameter's.
                        if self.peek() == Tok::Dot("ptr") {
                            self.pos += 1;
                            while let Tok::Dot(word) = self.peek() {
                                self.pos += 1;
                                if word == "align" {
                                    self.int()?;
                                }
                            }
                        }
                        break bytes;
                    }
                    None => return Err(FrontError::new(line, format!("unimplemented: variable of type .{ty}"))),
                },
                _ => {
                    self.pos -= 1;
                    return self.error("a type");
                }
            }
        };
        let name = self.word()?;
        let align = align.unwrap_or((elem * vector) as u32);
        if !align.is_power_of_two() || align > 1 << 16 {
            return Err(FrontError::new(line, format!("alignment of `{name}` is {align}, must be a power of two up to 65536")));
        }
        let mut bytes = elem * vector;
        let mut unsized_array = false;
        while self.eat(b'[') {
            if self.eat(b']') {
                unsized_array = true;
                bytes = 0;
                continue;
            }
            let n = self.int()?;
            bytes = bytes
                .checked_mul(n)
                .filter(|&b| b <= MAX_VAR_BYTES)
                .ok_or_else(|| FrontError::new(line, format!("`{name}` has {n} times {bytes} bytes, must be at most {MAX_VAR_BYTES}")))?;
            self.want(b']')?;
        }
        let mut init = Vec::new();
        if self.eat(b'=') {
            self.init(&mut init, elem as u8)?;
            let given: u64 = init.iter().map(|i| if let Init::Bits(_, w) = i { u64::from(*w) } else { 8 }).sum();
            if unsized_array {
                bytes = given;
                unsized_array = false;
            } else if given > bytes {
                return Err(FrontError::new(line, format!("`{name}` has {bytes} bytes and {given} bytes of initialisers")));
            }
        }
        Ok(Var { space, name, align, bytes, unsized_array, init, line })
    }

    fn init(&mut self, out: &mut Vec<Init<'a>>, width: u8) -> Result<()> {
        let mut depth = 0;
        loop {
            match self.next() {
                Tok::Punct(b'{') => depth += 1,
                Tok::Punct(b'}') => depth -= 1,
                Tok::Punct(b',') => {}
                Tok::Punct(b'-') => match self.next() {
                    Tok::Int(v) => out.push(Init::Bits(v.wrapping_neg(), width)),
                    _ => return self.error("a number"),
                },
                Tok::Int(v) | Tok::F64(v) => out.push(Init::Bits(v, width)),
                Tok::F32(v) => out.push(Init::Bits(v.into(), width)),
                Tok::Word("generic") => {
                    self.want(b'(')?;
                    let (name, offset) = self.symbol()?;
                    self.want(b')')?;
                    out.push(Init::Address(name, offset));
                }
                Tok::Word(_) => {
                    self.pos -= 1;
                    let (name, offset) = self.symbol()?;
                    out.push(Init::Address(name, offset));
                }
                _ => {
                    self.pos -= 1;
                    return self.error("an initialiser");
                }
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }

    fn symbol(&mut self) -> Result<(&'a str, i64)> {
        let name = self.word()?;
        Ok((name, self.offset()?))
    }

    /// A chain of `+n` and `-n`, and `+-n`.
    fn offset(&mut self) -> Result<i64> {
        let mut total = 0i64;
        loop {
            let negative = if self.eat(b'+') {
                false
            } else if self.peek() == Tok::Punct(b'-') {
                self.pos += 1;
                true
            } else {
                return Ok(total);
            };
            let v = self.int()? as i64;
            total = total.wrapping_add(if negative { v.wrapping_neg() } else { v });
        }
    }
}
