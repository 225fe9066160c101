//! Copies to a GPU, cut into pieces that threads share: elements as they lie, or floats that are rounded to
//! another type piece by piece, so that the host never holds a whole matrix of them.

use std::borrow::Cow;
use std::marker::PhantomData;

use dropless::{Buffer, DType, Element, Float, Place, RowsMut, Stream, WeightRows};

use super::buffers::{Buffers, Weight, stride};
use super::{Failure, Spec, Tensors, refuse};

/// Bytes that a thread takes at a time: enough to copy without a pause, small enough to share a matrix.
/// Smaller where tests run, which are built with debug assertions, so that small models are cut, too.
const PIECE_BYTES: usize = if cfg!(any(test, debug_assertions)) { 1000 } else { 16 << 20 };

/// A copy to do.
pub struct Piece<'a> {
    /// Bytes that arrive, without those between rows.
    pub bytes: u64,
    copy: Box<Queue<'a>>,
}

/// Queues a copy on a stream.
type Queue<'a> = dyn FnOnce(&Stream) -> Result<(), Failure> + Send + 'a;

impl Piece<'_> {
    /// Queues it. The host's elements may be dropped at once.
    pub fn copy(self, stream: &Stream) -> Result<(), Failure> {
        (self.copy)(stream)
    }
}

/// Matrices on the host.
#[derive(Clone, Copy)]
pub struct From<'a> {
    pub tensors: &'a dyn Tensors,
    pub specs: &'a [Spec],
}

/// The copies of some matrices to the buffers that are theirs.
pub fn pieces<'a, W: Weight>(buffers: &'a mut Buffers<W>, from: From<'a>) -> Result<Vec<Piece<'a>>, Failure> {
    let mut all = Vec::new();
    for (index, (buffer, spec)) in buffers.0.iter_mut().zip(from.specs).enumerate() {
        all.append(&mut float_pieces(buffer, spec, &from.tensors.parts(index, spec)?)?);
    }
    Ok(all)
}

/// The copies of one matrix, whose parts lie one below the other in the buffer.
pub fn float_pieces<'a, W: Weight>(buffer: &'a mut Buffer<W>, spec: &'a Spec, parts: &[WeightRows<'a>]) -> Result<Vec<Piece<'a>>, Failure> {
    let cols = spec.dims()[1];
    let stride = stride::<W>(buffer.place(), cols);
    let mut filling = Filling::new(buffer, spec, [cols, stride])?;
    parts.iter().try_for_each(|part| filling.floats(part))?;
    Ok(filling.pieces)
}

/// A buffer that is filled from its beginning.
pub struct Filling<'a, T> {
    spec: &'a Spec,
    place: Place,
    address: u64,
    /// Elements of the buffer, and how many of them the pieces fill.
    len: usize,
    at: usize,
    layout: Layout,
    pieces: Vec<Piece<'a>>,
    _buffer: PhantomData<&'a mut Buffer<T>>,
}

/// Rows of so many elements, with so many zeros after each.
#[derive(Clone, Copy)]
struct Layout {
    cols: usize,
    gap: usize,
}

/// What some elements of the host become in a buffer, or the first one that the type there cannot hold.
type Change<W, T> = for<'v> fn(&'v [W], Layout) -> Result<Cow<'v, [T]>, f32>;

impl<'a, T: Element> Filling<'a, T> {
    /// Nothing yet. Rows of `cols` elements are to begin `stride` elements apart.
    pub fn new(buffer: &'a mut Buffer<T>, spec: &'a Spec, [cols, stride]: [usize; 2]) -> Result<Filling<'a, T>, Failure> {
        let (place, len) = (buffer.place(), buffer.len());
        let (address, layout) = (buffer.rows_mut(1, len)?.address(), Layout { cols, gap: stride - cols });
        Ok(Filling { spec, place, address, len, at: 0, layout, pieces: Vec::new(), _buffer: PhantomData })
    }

    /// Adds whole rows as they are.
    pub fn same(&mut self, values: &'a [T]) -> Result<(), Failure> {
        self.add(values, as_they_are)
    }

    /// All copies.
    pub fn pieces(self) -> Vec<Piece<'a>> {
        self.pieces
    }

    fn add<W: Element>(&mut self, values: &'a [W], change: Change<W, T>) -> Result<(), Failure> {
        let Layout { cols, gap } = self.layout;
        let elements = PIECE_BYTES / size_of::<T>();
        let whole_rows = if gap == 0 { elements } else { (elements / cols.max(1)).max(1) * cols };
        for from in values.chunks(whole_rows.max(1)) {
            let len = from.len() + if gap == 0 { 0 } else { from.len() / cols * gap };
            let (address, end) = (self.address + (self.at * size_of::<T>()) as u64, self.at + len);
            if end > self.len {
                return refuse(format!("{end} elements or more of `{}` for a buffer of {}", self.spec.name(), self.len));
            }
            // SAFETY: elements of the buffer, which is borrowed as long as the piece; no other piece has
            // them. Who copies orders the copies after the buffer's earlier uses, and later ones after the
            // copies, by joining streams; where it comes to neither, the uploader is dropped before the
            // buffer, and waits for its streams.
            #[allow(unsafe_code)]
            let mut to = unsafe { RowsMut::<T>::from_raw(self.place, address, 1, len, len)? };
            let (spec, layout) = (self.spec, self.layout);
            let copy = move |stream: &Stream| match change(from, layout) {
                Ok(values) => Ok(to.copy_from_slice(stream, &values)?),
                Err(value) => beyond(spec, value, T::DTYPE),
            };
            self.pieces.push(Piece { bytes: (from.len() * size_of::<T>()) as u64, copy: Box::new(copy) });
            self.at = end;
        }
        Ok(())
    }
}

impl<'a, W: Weight> Filling<'a, W> {
    /// Adds the rows of a matrix of floats, rounded to the buffer's type where they have another one.
    fn floats(&mut self, part: &WeightRows<'a>) -> Result<(), Failure> {
        match (W::elements(part), part) {
            (Some(same), _) => self.same(same),
            (None, WeightRows::F32(rows)) => self.rounded(rows.as_slice()),
            (None, WeightRows::Bf16(rows)) => self.rounded(rows.as_slice()),
            (None, WeightRows::F16(rows)) => self.rounded(rows.as_slice()),
            (None, _) => self.rounded::<f32>(None),
        }
    }

    fn rounded<V: Float>(&mut self, values: Option<&'a [V]>) -> Result<(), Failure> {
        match values {
            Some(values) => self.add(values, rounded),
            None => refuse(format!("tensor `{}` must be of floats and on the host", self.spec.name())),
        }
    }
}

fn beyond<T>(spec: &Spec, value: f32, dtype: DType) -> Result<T, Failure> {
    refuse(format!("tensor `{}` has {value:e}, which no {} holds; see --activations", spec.name(), dtype.name()))
}

fn as_they_are<T: Element>(values: &[T], layout: Layout) -> Result<Cow<'_, [T]>, f32> {
    Ok(if layout.gap == 0 { Cow::Borrowed(values) } else { Cow::Owned(layout.spread(values, |value| value)) })
}

/// To nearest, ties to even. What was finite stays finite.
fn rounded<V: Float, W: Float>(values: &[V], layout: Layout) -> Result<Cow<'_, [W]>, f32> {
    let to = |value: V| W::from_f32(value.to_f32());
    let all = layout.spread(values, to);
    let is_lost = |value: &&V| value.to_f32().is_finite() && !to(**value).to_f32().is_finite();
    match values.iter().find(is_lost) {
        Some(value) => Err(value.to_f32()),
        None => Ok(Cow::Owned(all)),
    }
}

impl Layout {
    fn spread<V: Element, T: Element>(self, values: &[V], to: impl Fn(V) -> T) -> Vec<T> {
        let Layout { cols, gap } = self;
        if gap == 0 {
            return values.iter().map(|value| to(*value)).collect();
        }
        let mut all = Vec::with_capacity(values.len() / cols * (cols + gap));
        for row in values.chunks(cols) {
            all.extend(row.iter().map(|value| to(*value)));
            all.resize(all.len() + gap, T::default());
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use dropless::{Bf16, F16, Rows};
    use dropless_kit::compare::same_bits;
    use dropless_kit::device;

    use super::super::super::spec::Part;
    use super::*;

    fn matrix(rows: usize, cols: usize) -> Spec {
        Spec::linear(Part::Dense, "w", [rows, cols])
    }

    #[test]
    fn more_than_a_buffer_holds_is_refused() {
        let stream = device::cpu(1);
        let (mut buffer, values, spec) = (Buffer::<f32>::zeros(&stream, 500).unwrap(), [1.0; 501], matrix(1, 501));
        assert!(Filling::new(&mut buffer, &spec, [501, 501]).unwrap().same(&values).is_err());
    }

    /// Floats of every type become those of another, rows with zeros after them included.
    #[test]
    fn floats_are_rounded_piece_by_piece() {
        const ROWS: usize = 100;
        let values: Vec<f32> = (0..ROWS * 7).map(|i| (i as f32 - 300.0) * 1.37e-3).collect();
        let halves: Vec<F16> = values.iter().map(|value| F16::from_f32(*value)).collect();
        let (_, stream) = device::emulated();
        let spec = matrix(ROWS, 7);
        fn copied<W: Weight>(stream: &Stream, spec: &Spec, from: WeightRows<'_>) -> Vec<W> {
            let mut one = Buffers::<W>::zeros(stream, std::slice::from_ref(spec)).unwrap();
            for piece in float_pieces(&mut one.0[0], spec, &[from]).unwrap() {
                piece.copy(stream).unwrap();
            }
            one.0[0].to_vec(stream).unwrap()
        }
        fn spread<W: Float>(values: &[f32]) -> Vec<W> {
            let stride = 7usize.next_multiple_of(16 / size_of::<W>());
            let all = values.chunks(7).flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, stride - 7)));
            all.map(W::from_f32).collect()
        }
        let wide = WeightRows::from(Rows::from_slice(&values, ROWS, 7).unwrap());
        let narrow = WeightRows::from(Rows::from_slice(&halves, ROWS, 7).unwrap());
        let of_halves: Vec<f32> = halves.iter().map(|value| value.to_f32()).collect();
        same_bits(&copied::<Bf16>(&stream, &spec, wide), &spread::<Bf16>(&values));
        same_bits(&copied::<f32>(&stream, &spec, wide), &spread::<f32>(&values));
        same_bits(&copied::<f32>(&stream, &spec, narrow), &spread::<f32>(&of_halves));
        same_bits(&copied::<Bf16>(&stream, &spec, narrow), &spread::<Bf16>(&of_halves));
    }

    #[test]
    fn what_a_type_cannot_hold_is_refused() {
        let stream = device::cpu(1);
        let (values, spec) = ([1.0f32, -70_000.0], matrix(1, 2));
        let from = [WeightRows::from(Rows::from_slice(&values, 1, 2).unwrap())];
        let mut buffer = Buffer::<F16>::zeros(&stream, 2).unwrap();
        let piece = float_pieces(&mut buffer, &spec, &from).unwrap().pop().unwrap();
        let text = piece.copy(&stream).unwrap_err().text().unwrap();
        assert_eq!(text, "refused: tensor `w` has -7e4, which no f16 holds; see --activations");
        // What is no finite number before stays what it is.
        let values = [f32::NAN, f32::NEG_INFINITY];
        let from = [WeightRows::from(Rows::from_slice(&values, 1, 2).unwrap())];
        float_pieces(&mut buffer, &spec, &from).unwrap().pop().unwrap().copy(&stream).unwrap();
        let got = buffer.to_vec(&stream).unwrap();
        assert!(got[0].to_f32().is_nan() && got[1].to_f32() == f32::NEG_INFINITY, "{got:?}");
    }
}
