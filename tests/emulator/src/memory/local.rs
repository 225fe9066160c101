//! Local memory of the lanes of one warp: a stack of frames, each exact to the byte.

/// Bytes of local memory one thread may have; the hardware's limit.
const LIMIT: u32 = 512 << 10;
/// Bytes between frames that belong to none.
const GAP: u32 = 16;

#[derive(Debug, Default)]
pub(crate) struct Local {
    /// Lane-major: `lane * stride + address`.
    data: Vec<u8>,
    init: Vec<bool>,
    stride: u32,
    /// Bytes per lane that exist: made at the first access, not when a frame is pushed.
    high: u32,
    /// Start and length of the frames, oldest first.
    frames: Vec<(u32, u32)>,
}

impl Local {
    /// A frame of `bytes`; its first address, or `None` beyond the limit.
    pub fn push(&mut self, bytes: u32) -> Option<u32> {
        let base = self.frames.last().map_or(0, |&(start, len)| (start + len + GAP).next_multiple_of(16));
        let end = base.checked_add(bytes).filter(|&e| e <= LIMIT)?;
        self.high = self.high.max(end);
        if base < self.stride {
            // Bytes of an earlier frame lay here.
            let end = end.min(self.stride);
            for lane in 0..32 {
                let row = (lane * self.stride) as usize;
                self.data[row + base as usize..row + end as usize].fill(0xff);
                self.init[row + base as usize..row + end as usize].fill(false);
            }
        }
        self.frames.push((base, bytes));
        Some(base)
    }

    /// Makes the bytes of all frames exist.
    fn grow(&mut self) {
        if self.high <= self.stride {
            return;
        }
        let stride = self.high.next_power_of_two().max(256);
        let mut data = vec![0xff; stride as usize * 32];
        let mut init = vec![false; stride as usize * 32];
        let n = self.stride as usize;
        for lane in 0..32 {
            let (old, new) = (lane * n, lane * stride as usize);
            data[new..new + n].copy_from_slice(&self.data[old..old + n]);
            init[new..new + n].copy_from_slice(&self.init[old..old + n]);
        }
        (self.data, self.init, self.stride) = (data, init, stride);
    }

    /// Removes the frame that starts at `base` and those above it.
    pub fn pop(&mut self, base: u32) {
        while self.frames.last().is_some_and(|&(start, _)| start >= base) {
            self.frames.pop();
        }
    }

    /// Where the bytes of a lane are, if one frame holds them all; otherwise the nearest frame's start and length.
    pub fn find(&mut self, lane: usize, address: u64, bytes: u32) -> Result<usize, (u32, u32)> {
        self.grow();
        let inside = |&&(start, len): &&(u32, u32)| {
            address >= start.into() && address.checked_add(bytes.into()).is_some_and(|end| end <= u64::from(start) + u64::from(len))
        };
        match self.frames.iter().rev().find(inside) {
            Some(_) => Ok(lane * self.stride as usize + address as usize),
            None => {
                let below = self.frames.iter().rev().find(|&&(start, _)| address >= start.into());
                Err(below.or(self.frames.first()).copied().unwrap_or((0, 0)))
            }
        }
    }

    pub fn read(&self, at: usize, len: usize) -> &[u8] {
        &self.data[at..at + len]
    }

    pub fn uninitialised(&self, at: usize, len: usize) -> bool {
        self.init[at..at + len].iter().any(|i| !i)
    }

    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
        self.init[at..at + bytes.len()].fill(true);
    }
}
