//! Branches, calls, returns, exits, traps.

use super::ty::Src;
use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError, ast::Arg, scope::Symbol};
use crate::machine::warp::{Frame, Group, State, Warp, lanes};
use crate::machine::{Machine, trouble};
use crate::report::Fault;

/// Deepest call stack of a lane.
const MAX_DEPTH: u32 = 256;

/// Bytes copied between a caller's parameter variable and a callee's: from, to, how many.
type Copy = (u32, u32, u32);

#[derive(Debug)]
pub(crate) enum Control {
    Bra {
        target: u32,
    },
    /// Branch by table.
    BrxIdx {
        table: u32,
        index: Src,
    },
    Call {
        function: u32,
        args: Vec<Copy>,
        rets: Vec<Copy>,
    },
    /// Call of the device runtime's assertion handler.
    AssertFail,
    Ret,
    Exit,
    Trap,
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let control = match ctx.name() {
        "bra" => {
            ctx.take("uni");
            match ctx.next()? {
                Arg::Name(label, None) => ctx.want_label(label),
                other => return ctx.error(format!("bra: `{other}` is not a label")),
            }
            Control::Bra { target: u32::MAX }
        }
        "brx" => {
            if !ctx.take("idx") {
                return ctx.unimplemented();
            }
            ctx.take("uni");
            let index = ctx.src(32)?;
            match ctx.next()? {
                Arg::Name(name, None) => match ctx.table(name) {
                    Some(table) => Control::BrxIdx { table, index },
                    None => return ctx.error(format!("brx.idx: `{name}` is not a list of branch targets")),
                },
                other => return ctx.error(format!("brx.idx: `{other}` is not a list of branch targets")),
            }
        }
        "call" => call(ctx)?,
        "ret" => {
            ctx.take("uni");
            Control::Ret
        }
        "exit" => Control::Exit,
        "trap" | "brkpt" => Control::Trap,
        _ => return Ok(None),
    };
    Ok(Some(Op::Control(control)))
}

fn call(ctx: &mut Ctx<'_, '_>) -> Result<Control, FrontError> {
    ctx.take("uni");
    let empty: Vec<Arg<'_>> = Vec::new();
    let mut next = ctx.next()?;
    let rets = match next {
        Arg::List(items) => {
            next = ctx.next()?;
            items
        }
        _ => &empty,
    };
    let Arg::Name(name, None) = next else { return ctx.error(format!("call: `{next}` is not a function")) };
    let index = match ctx.symbol(name)? {
        Some(Symbol::Function(index)) => index,
        _ => return ctx.error(format!("unimplemented: indirect call through `{name}`")),
    };
    let args = match ctx.peek() {
        Some(Arg::List(items)) => {
            ctx.next()?;
            items
        }
        _ => &empty,
    };
    if *name == "__assertfail" {
        return Ok(Control::AssertFail);
    }
    let info = ctx.function_info(index);
    let (params, results) = (info.params.clone(), info.rets.clone());
    let (has_body, is_entry) = (info.has_body, info.entry);
    if !has_body || is_entry {
        return ctx.error(format!("unimplemented: call of `{name}`, which has no body in this image"));
    }
    if args.len() != params.len() || rets.len() != results.len() {
        return ctx.error(format!(
            "call of `{name}` with {} arguments and {} results, it has {} and {}",
            args.len(),
            rets.len(),
            params.len(),
            results.len()
        ));
    }
    let mut copies = Vec::new();
    for (arg, slot) in args.iter().zip(&params) {
        copies.push((place(ctx, name, arg, slot.bytes)?, slot.offset, slot.bytes));
    }
    let mut backs = Vec::new();
    for (ret, slot) in rets.iter().zip(&results) {
        backs.push((slot.offset, place(ctx, name, ret, slot.bytes)?, slot.bytes));
    }
    Ok(Control::Call { function: index, args: copies, rets: backs })
}

/// Where a parameter variable of a call lies in the caller's frame.
fn place<'a>(ctx: &mut Ctx<'_, 'a>, function: &str, arg: &Arg<'a>, want: u32) -> Result<u32, FrontError> {
    if let Arg::Name(name, None) = arg
        && let Some(Symbol::Param(at, bytes)) = ctx.symbol(name)?
    {
        if bytes == want {
            return Ok(at);
        }
        return ctx.error(format!("call of `{function}`: `{name}` has {bytes} bytes, the function wants {want}"));
    }
    ctx.error(format!("call of `{function}`: `{arg}` is not a parameter variable"))
}

/// Splits the running group: lanes of `mask` go to `target`, the others to the next instruction.
fn branch(w: &mut Warp, mask: u32, target: u32) -> Flow {
    if mask == w.cur.mask {
        w.cur.pc = target;
    } else {
        let stay = w.cur.mask & !mask;
        w.others.push(Group { pc: target, mask, frame: w.cur.frame, state: State::Ready, result: None });
        w.cur.mask = stay;
        w.cur.pc += 1;
    }
    Flow::Jumped
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, inst: &Control, mask: u32) -> Exec {
    match inst {
        Control::Bra { target } => {
            let flow = branch(w, mask, *target);
            // Lanes that branch to a return have nothing left to do: they leave at once, so that nobody waits for them.
            leave_early(m, w)?;
            Ok(flow)
        }
        Control::BrxIdx { table, index } => {
            let index = w.get32(*index);
            let targets = &m.env.program.tables[*table as usize];
            let mut left = mask;
            let stay = w.cur.mask & !mask;
            let pc = w.cur.pc;
            w.cur.mask = 0;
            while left != 0 {
                let lane = left.trailing_zeros() as usize;
                let i = index[lane];
                let Some(&target) = targets.get(i as usize) else {
                    let text = format!("branch table index is {i}, the table has {} entries", targets.len());
                    return Err(trouble(Fault::BadOperand, text).at_lane(lane));
                };
                let same = lanes(left).filter(|&l| index[l] == i).fold(0, |a, l| a | 1 << l);
                left &= !same;
                w.others.push(Group { pc: target, mask: same, frame: w.cur.frame, state: State::Ready, result: None });
            }
            if stay != 0 {
                w.others.push(Group { pc: pc + 1, mask: stay, frame: w.cur.frame, state: State::Ready, result: None });
            }
            Ok(Flow::Jumped)
        }
        Control::Call { function, args, .. } => call_exec(m, w, *function, args, mask),
        Control::Ret if w.cur.frame != 0 => {
            ret_exec(m, w, mask);
            Ok(Flow::Jumped)
        }
        Control::Ret | Control::Exit => {
            m.exit_lanes(w, mask)?;
            if w.cur.mask != 0 {
                w.cur.pc += 1;
            }
            Ok(Flow::Jumped)
        }
        Control::Trap => Err(trouble(Fault::Trap, "trap").at_lane(mask.trailing_zeros() as usize)),
        Control::AssertFail => Err(trouble(Fault::Trap, "device assertion failed").at_lane(mask.trailing_zeros() as usize)),
    }
}

/// Retires groups of the entry frame that stand at an unguarded return.
fn leave_early(m: &mut Machine<'_>, w: &mut Warp) -> Result<(), crate::machine::Trouble> {
    let mut i = 0;
    while i < w.others.len() {
        let g = &w.others[i];
        let code = &m.env.program.code[g.pc as usize];
        let leaves =
            g.frame == 0 && g.state == State::Ready && code.guard.always() && matches!(code.op, Op::Control(Control::Ret | Control::Exit));
        if leaves {
            let group = w.others.swap_remove(i);
            m.exit_lanes(w, group.mask)?;
        } else {
            i += 1;
        }
    }
    Ok(())
}

fn call_exec(m: &mut Machine<'_>, w: &mut Warp, function: u32, args: &[Copy], mask: u32) -> Exec {
    let info = &m.env.program.functions[function as usize];
    let parent = w.cur.frame;
    let depth = w.frames[parent as usize].depth + 1;
    let lane = mask.trailing_zeros() as usize;
    if depth > MAX_DEPTH {
        return Err(trouble(Fault::Stack, format!("calls nest deeper than {MAX_DEPTH}")).at_lane(lane));
    }
    let Some(local_base) = w.local.push(info.local_bytes) else {
        return Err(trouble(Fault::Stack, format!("local memory is full, {} needs {} bytes", info.name, info.local_bytes)).at_lane(lane));
    };
    let (base32, base64, basep) = w.extend_rows(info);
    let stride = info.frame_param_bytes as usize;
    let mut params = vec![0xff; stride * 32];
    let caller = &w.frames[parent as usize];
    let caller_stride = caller.params.len() / 32;
    let caller_skip = if depth == 1 { m.env.params.len() } else { 0 };
    for lane in lanes(mask) {
        for &(from, to, n) in args {
            let (from, to, n) = (lane * caller_stride + from as usize - caller_skip, lane * stride + to as usize, n as usize);
            params[to..to + n].copy_from_slice(&caller.params[from..from + n]);
        }
    }
    let pc = w.cur.pc;
    let frame = Frame { parent, depth, return_pc: pc + 1, call_pc: pc, base32, base64, basep, local_base, params, live: mask };
    let index = w.frames.len() as u32;
    w.frames.push(frame);
    let stay = w.cur.mask & !mask;
    if stay != 0 {
        w.others.push(Group { pc: pc + 1, mask: stay, frame: parent, state: State::Ready, result: None });
    }
    w.cur = Group { pc: info.start, mask, frame: index, state: State::Ready, result: None };
    w.enter_frame();
    w.merge_pc = u32::MAX;
    Ok(Flow::Jumped)
}

fn ret_exec(m: &mut Machine<'_>, w: &mut Warp, mask: u32) {
    let index = w.cur.frame as usize;
    let (parent, return_pc, call_pc) = (w.frames[index].parent, w.frames[index].return_pc, w.frames[index].call_pc);
    if let Op::Control(Control::Call { rets, .. }) = &m.env.program.code[call_pc as usize].op {
        let params = std::mem::take(&mut w.frames[index].params);
        let stride = params.len() / 32;
        let skip = if w.frames[parent as usize].depth == 0 { m.env.params.len() } else { 0 };
        let caller = &mut w.frames[parent as usize].params;
        let caller_stride = caller.len() / 32;
        for lane in lanes(mask) {
            for &(from, to, n) in rets {
                let (from, to, n) = (lane * stride + from as usize, lane * caller_stride + to as usize - skip, n as usize);
                caller[to..to + n].copy_from_slice(&params[from..from + n]);
            }
        }
        w.frames[index].params = params;
    }
    w.frames[index].live &= !mask;
    let stay = w.cur.mask & !mask;
    if stay != 0 {
        w.others.push(Group { pc: w.cur.pc + 1, mask: stay, frame: index as u32, state: State::Ready, result: None });
    }
    w.cur = Group { pc: return_pc, mask, frame: parent, state: State::Ready, result: None };
    w.drop_dead_frames();
    w.enter_frame();
    w.merge_pc = u32::MAX;
}

impl Warp {
    /// Frees the frames on top of the stack that no lane is in any more, with their rows and locals.
    pub fn drop_dead_frames(&mut self) {
        while let Some(frame) = self.frames.last() {
            if frame.live != 0 || self.frames.len() == 1 {
                break;
            }
            let (w, d, p, local) = (frame.base32, frame.base64, frame.basep, frame.local_base);
            self.truncate_rows(w, d, p);
            self.local.pop(local);
            self.frames.pop();
        }
    }
}
