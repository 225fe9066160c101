//! Rows so far apart that element offsets pass 2^31: the third begins behind them. Few pages of such memory
//! are touched.

use std::cell::RefCell;
use std::sync::Arc;

use dropless::device::driver::Driver;
use dropless::{Buffer, Rows, RowsMut, Stream};
use dropless_kit::device;
use dropless_kit::emulated::Emulated;
use dropless_kit::guard::Bits;

const STRIDE: usize = (1 << 30) + 64;
const _: () = assert!(2 * STRIDE > 1 << 31);

/// A device, and memory on it that lasts as long.
pub struct Memory {
    pub stream: Stream,
    device: Kind,
}

enum Kind {
    Cpu(RefCell<Vec<Buffer<u32>>>),
    Emulated(Arc<Emulated>),
}

impl Memory {
    /// Room for `rows` of `cols` elements, and its address.
    fn room<T: Bits>(&self, rows: usize, cols: usize) -> u64 {
        let bytes = ((rows - 1) * STRIDE + cols) * size_of::<T>();
        match &self.device {
            Kind::Cpu(held) => {
                let mut buffer = Buffer::<u32>::zeros(&self.stream, bytes.div_ceil(4)).unwrap();
                let address = buffer.as_mut_slice().unwrap().as_mut_ptr().expose_provenance() as u64;
                held.borrow_mut().push(buffer);
                address
            }
            Kind::Emulated(driver) => driver.alloc(0, bytes).unwrap(),
        }
    }

    /// Packed `values` as rows far apart.
    pub fn rows<T: Bits>(&self, values: &[T], cols: usize) -> Rows<'_, T> {
        let rows = values.len() / cols;
        let at = self.room::<T>(rows, cols);
        for (row, values) in values.chunks(cols).enumerate() {
            let to = at + (row * STRIDE * size_of::<T>()) as u64;
            match &self.device {
                // SAFETY: inside of the room, which nobody else knows of yet.
                Kind::Cpu(_) => unsafe {
                    std::ptr::with_exposed_provenance_mut::<T>(to as usize).copy_from_nonoverlapping(values.as_ptr(), cols);
                },
                Kind::Emulated(driver) => {
                    let bytes: Vec<u8> = values.iter().flat_map(|value| value.bits().to_le_bytes()[..size_of::<T>()].to_vec()).collect();
                    device::write(&**driver, 0, to, &bytes).unwrap();
                }
            }
        }
        // SAFETY: the room lasts as long as `self`, holds that many elements, and is not written any more.
        unsafe { Rows::from_raw(self.stream.place(), at, rows, cols, STRIDE).unwrap() }
    }

    /// Rows far apart that an operation writes.
    pub fn rows_mut<T: Bits>(&self, rows: usize, cols: usize) -> RowsMut<'_, T> {
        // SAFETY: the room lasts as long as `self`, holds that many elements, and this is its only view.
        unsafe { RowsMut::from_raw(self.stream.place(), self.room::<T>(rows, cols), rows, cols, STRIDE).unwrap() }
    }
}

/// Calls `test` on the CPU and on an emulated GPU, whose detectors must have nothing to say.
pub fn each_device(test: impl Fn(&Memory)) {
    let stream = device::cpu(2);
    if Buffer::<u32>::zeros(&stream, 8 * STRIDE).is_ok() {
        test(&Memory { stream, device: Kind::Cpu(RefCell::default()) });
    } else {
        eprintln!("NOT RUN on the CPU: it has no 32 GiB of addresses");
    }
    let (driver, stream) = device::emulated();
    test(&Memory { stream, device: Kind::Emulated(driver.clone()) });
    assert_eq!(driver.reports(), [""; 0]);
}
