//! Function bodies: declarations, labels, line information, instructions and their operands.

use super::super::FrontError;
use super::super::ast::{Arg, Inst, Loc, MemBase, RegBits, Stmt};
use super::super::lex::Tok;
use super::{MAX_NESTING, Parser, Result, type_bytes};

impl<'a> Parser<'a> {
    pub(super) fn body(&mut self) -> Result<Vec<Stmt<'a>>> {
        self.want(b'{')?;
        let mut out = Vec::new();
        let mut depth = 1usize;
        while depth > 0 {
            let line = self.line();
            match self.peek() {
                Tok::Punct(b'{') => {
                    self.pos += 1;
                    depth += 1;
                    if depth > MAX_NESTING {
                        return Err(FrontError::new(line, format!("scopes nest deeper than {MAX_NESTING}")));
                    }
                    out.push(Stmt::Open);
                }
                Tok::Punct(b'}') => {
                    self.pos += 1;
                    depth -= 1;
                    if depth > 0 {
                        out.push(Stmt::Close);
                    }
                }
                Tok::Punct(b';') => self.pos += 1,
                Tok::Dot("reg") => self.reg(&mut out)?,
                Tok::Dot("shared" | "local" | "param" | "global" | "const") => self.vars(&mut |v| out.push(Stmt::Var(v)))?,
                Tok::Dot("loc") => {
                    let loc = self.loc()?;
                    out.push(Stmt::Loc(loc));
                }
                Tok::Dot("pragma") => {
                    while !self.eat(b';') {
                        if self.next() == Tok::End {
                            return self.error("`;`");
                        }
                    }
                }
                Tok::Dot(other) => return Err(FrontError::new(line, format!("unimplemented: directive .{other}"))),
                Tok::Word(name) if self.toks.get(self.pos + 1).map(|t| t.tok) == Some(Tok::Punct(b':')) => {
                    self.pos += 2;
                    match self.peek() {
                        Tok::Dot("branchtargets") => {
                            self.pos += 1;
                            let mut labels = vec![self.word()?];
                            while self.eat(b',') {
                                labels.push(self.word()?);
                            }
                            self.want(b';')?;
                            out.push(Stmt::Targets { name, labels, line });
                        }
                        Tok::Dot("callprototype" | "calltargets") => {
                            return Err(FrontError::new(line, "unimplemented: indirect call"));
                        }
                        _ => out.push(Stmt::Label { name, line }),
                    }
                }
                Tok::Word(_) | Tok::Punct(b'@') => {
                    let inst = self.inst()?;
                    out.push(Stmt::Inst(inst));
                }
                _ => return self.error("a statement"),
            }
        }
        Ok(out)
    }

    fn reg(&mut self, out: &mut Vec<Stmt<'a>>) -> Result<()> {
        self.pos += 1;
        let line = self.line();
        let bits = match self.next() {
            Tok::Dot("pred") => RegBits::Pred,
            Tok::Dot("b8" | "u8" | "s8") => RegBits::Bits(8),
            Tok::Dot(ty) => match type_bytes(ty) {
                Some(bytes @ (2 | 4 | 8)) => RegBits::Bits(bytes as u8 * 8),
                _ => return Err(FrontError::new(line, format!("unimplemented: register of type .{ty}"))),
            },
            _ => {
                self.pos -= 1;
                return self.error("a type");
            }
        };
        loop {
            let name = self.word()?;
            let count = if self.eat(b'<') {
                let n = self.int()?;
                self.want(b'>')?;
                Some(n)
            } else {
                None
            };
            out.push(Stmt::Reg { bits, name, count, line });
            if self.eat(b';') {
                return Ok(());
            }
            self.want(b',')?;
        }
    }

    pub(super) fn loc(&mut self) -> Result<Loc> {
        self.pos += 1;
        let triple = |p: &mut Self| Ok::<_, FrontError>((p.small("file index")?, p.small("line")?, p.small("column")?));
        let at = triple(self)?;
        let mut inlined_at = None;
        while self.eat(b',') {
            match self.next() {
                Tok::Word("function_name") => {
                    self.word()?;
                    self.offset()?;
                }
                Tok::Word("inlined_at") => inlined_at = Some(triple(self)?),
                _ => {
                    self.pos -= 1;
                    return self.error("`function_name` or `inlined_at`");
                }
            }
        }
        // `function_name $L__info_string0, inlined_at 1 16 3` follows its comma.
        if self.peek() == Tok::Word("inlined_at") {
            self.pos += 1;
            inlined_at = Some(triple(self)?);
        }
        Ok(Loc { at, inlined_at })
    }

    fn inst(&mut self) -> Result<Inst<'a>> {
        let line = self.line();
        let guard = if self.eat(b'@') {
            let negated = self.eat(b'!');
            Some((self.word()?, negated))
        } else {
            None
        };
        let name = self.word()?;
        let mut mods = Vec::new();
        while let Tok::Dot(m) = self.peek() {
            mods.push(m);
            self.pos += 1;
        }
        let mut args = Vec::new();
        if !self.eat(b';') {
            loop {
                args.push(self.arg(0)?);
                if self.eat(b';') {
                    break;
                }
                self.want(b',')?;
            }
        }
        Ok(Inst { guard, name, mods, args, line })
    }

    fn args_until(&mut self, close: u8, depth: usize) -> Result<Vec<Arg<'a>>> {
        let mut out = Vec::new();
        if self.eat(close) {
            return Ok(out);
        }
        loop {
            out.push(self.arg(depth)?);
            if self.eat(close) {
                return Ok(out);
            }
            self.want(b',')?;
        }
    }

    fn arg(&mut self, depth: usize) -> Result<Arg<'a>> {
        if depth > MAX_NESTING {
            return Err(FrontError::new(self.line(), format!("operands nest deeper than {MAX_NESTING}")));
        }
        let arg = match self.peek() {
            Tok::Punct(b'!') => {
                self.pos += 1;
                Arg::Not(Box::new(self.arg(depth + 1)?))
            }
            Tok::Punct(b'-') | Tok::Int(_) => {
                if self.peek() == Tok::Punct(b'-')
                    && let Some(Tok::F64(v)) = self.toks.get(self.pos + 1).map(|t| t.tok)
                {
                    self.pos += 2;
                    return Ok(Arg::F64((-f64::from_bits(v)).to_bits()));
                }
                Arg::Int(self.int()?)
            }
            Tok::F32(v) => {
                self.pos += 1;
                Arg::F32(v)
            }
            Tok::F64(v) => {
                self.pos += 1;
                Arg::F64(v)
            }
            Tok::Punct(b'{') => {
                self.pos += 1;
                Arg::Vector(self.args_until(b'}', depth + 1)?)
            }
            Tok::Punct(b'(') => {
                self.pos += 1;
                Arg::List(self.args_until(b')', depth + 1)?)
            }
            Tok::Punct(b'[') => {
                self.pos += 1;
                let base = match self.peek() {
                    Tok::Word(w) => {
                        self.pos += 1;
                        MemBase::Name(w)
                    }
                    _ => MemBase::Int(self.int()?),
                };
                let offset = self.offset()?;
                let coords = if self.eat(b',') {
                    self.want(b'{')?;
                    Some(self.args_until(b'}', depth + 1)?)
                } else {
                    None
                };
                self.want(b']')?;
                Arg::Mem { base, offset, coords }
            }
            Tok::Word(w) => {
                self.pos += 1;
                if let Tok::Dot(part) = self.peek() {
                    self.pos += 1;
                    Arg::Name(w, Some(part))
                } else if matches!(self.peek(), Tok::Punct(b'+' | b'-')) {
                    Arg::NameOffset(w, self.offset()?)
                } else {
                    Arg::Name(w, None)
                }
            }
            _ => return self.error("an operand"),
        };
        if self.peek() == Tok::Punct(b'|') {
            self.pos += 1;
            return Ok(Arg::Pair(Box::new(arg), Box::new(self.arg(depth + 1)?)));
        }
        Ok(arg)
    }
}
