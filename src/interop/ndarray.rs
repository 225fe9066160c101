//! Two-dimensional `ndarray` views and this crate's, both ways, where the elements lie.
//!
//! A row-major view's columns are one element apart; its rows may be any distance apart, and what lies
//! between them is never touched, so that the parts of an array that was split by columns can be used at
//! once.
#![allow(unsafe_code)] // a view's parts become the other's

use ::ndarray::{ArrayView2, ArrayViewMut2, Ix2, ShapeBuilder, StrideShape};

use crate::dtype::Element;
use crate::error::{Error, Op, Place};
use crate::view::{Rows, RowsMut};

/// The elements from one row to the next, of an array whose axes have these lengths and strides.
fn row_stride(dims: (usize, usize), strides: &[isize]) -> Result<usize, Error> {
    let layout = |need, got: isize| Err(Error::Layout { op: Op::View, arg: "array", need, got: got.unsigned_abs() });
    match (dims, strides) {
        ((0, cols) | (_, cols @ 0), _) => Ok(cols),
        ((_, 2..), [_, step]) if *step < 0 => layout("columns that are not reversed, one element apart", *step),
        ((_, 2..), [_, step]) if *step != 1 => layout("columns one element apart", *step),
        ((1, cols), _) => Ok(cols),
        (_, [step, _]) if *step < 0 => layout("rows that are not reversed", *step),
        (_, [step, _]) => Ok(step.unsigned_abs()),
        _ => unreachable!("{} strides of two axes", strides.len()),
    }
}

/// A host array's rows, where they lie.
///
/// # Errors
///
/// [`Error::Layout`] unless the columns lie one element apart and the rows at least as far apart as there are
/// columns, neither reversed nor repeated; [`Error::TooLarge`] beyond the address space.
///
/// ```
/// use dropless::Rows;
/// use ndarray::{Array2, s};
///
/// let array = Array2::from_shape_fn((3, 4), |(row, col)| (10 * row + col) as f32);
/// let rows = Rows::try_from(array.slice(s![1.., 1..3]))?;
/// assert_eq!((rows.dims(), rows.stride()), ([2, 2], 4));
///
/// let error = Rows::try_from(array.t()).err().unwrap();
/// assert_eq!(error.to_string(), "view: `array` must have columns one element apart, got 4");
/// # Ok::<(), dropless::Error>(())
/// ```
impl<'a, T: Element> TryFrom<ArrayView2<'a, T>> for Rows<'a, T> {
    type Error = Error;

    fn try_from(array: ArrayView2<'a, T>) -> Result<Self, Error> {
        let (rows, cols) = array.dim();
        let stride = row_stride((rows, cols), array.strides())?;
        let address = array.as_ptr().expose_provenance() as u64;
        // SAFETY: the array's own elements, `stride` apart from row to row, borrowed for as long as the view.
        unsafe { Rows::from_raw(Place::Host, address, rows, cols, stride) }
    }
}

/// A host array's rows, for writing where they lie.
///
/// # Errors
///
/// As of the conversion for reading.
///
/// ```
/// use dropless::{Device, Rows, RowsMut, glu};
/// use ndarray::Array2;
///
/// let (gate, up) = (Array2::<f32>::ones((2, 3)), Array2::<f32>::ones((2, 3)));
/// let mut y = Array2::<f32>::zeros((2, 3));
/// let stream = Device::cpu().stream()?;
/// glu::glu(&stream, Rows::try_from(gate.view())?, Rows::try_from(up.view())?, &mut RowsMut::try_from(y.view_mut())?)?;
/// assert!((y[[1, 2]] - 0.7310586).abs() < 1e-6);
/// # Ok::<(), dropless::Error>(())
/// ```
impl<'a, T: Element> TryFrom<ArrayViewMut2<'a, T>> for RowsMut<'a, T> {
    type Error = Error;

    fn try_from(mut array: ArrayViewMut2<'a, T>) -> Result<Self, Error> {
        let (rows, cols) = array.dim();
        let stride = row_stride((rows, cols), array.strides())?;
        let address = array.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: the array's own elements, `stride` apart from row to row, borrowed exclusively for as long
        // as the view.
        unsafe { RowsMut::from_raw(Place::Host, address, rows, cols, stride) }
    }
}

/// Rows of host memory as an array.
///
/// # Errors
///
/// [`Error::Mismatch`] for the memory of a GPU.
///
/// ```
/// use dropless::Rows;
/// use ndarray::ArrayView2;
///
/// let array = ArrayView2::try_from(Rows::from_slice_strided(&[0.0f32, 1.0, 2.0, 3.0, 4.0], 2, 2, 3)?)?;
/// assert_eq!(array, ndarray::arr2(&[[0.0, 1.0], [3.0, 4.0]]));
/// # Ok::<(), dropless::Error>(())
/// ```
impl<'a, T: Element> TryFrom<Rows<'a, T>> for ArrayView2<'a, T> {
    type Error = Error;

    fn try_from(rows: Rows<'a, T>) -> Result<Self, Error> {
        let shape = shape(rows.place(), rows.dims(), rows.stride())?;
        // SAFETY: the view's elements, borrowed for as long as the array.
        Ok(unsafe { ArrayView2::from_shape_ptr(shape, rows.first()) })
    }
}

/// Rows of host memory as an array, for writing.
///
/// # Errors
///
/// [`Error::Mismatch`] for the memory of a GPU.
impl<'a, T: Element> TryFrom<RowsMut<'a, T>> for ArrayViewMut2<'a, T> {
    type Error = Error;

    fn try_from(rows: RowsMut<'a, T>) -> Result<Self, Error> {
        let shape = shape(rows.place(), rows.dims(), rows.stride())?;
        // SAFETY: the view's elements, borrowed exclusively for as long as the array; rows do not overlap.
        Ok(unsafe { ArrayViewMut2::from_shape_ptr(shape, rows.as_rows().first().cast_mut()) })
    }
}

/// The shape of an array on the host.
fn shape(place: Place, [rows, cols]: [usize; 2], stride: usize) -> Result<StrideShape<Ix2>, Error> {
    if place != Place::Host {
        return Err(Error::mismatch(Op::View, "rows", "on the host", "rows on a GPU"));
    }
    // A single row may have a stride that says nothing.
    Ok((rows, cols).strides((if rows > 1 { stride } else { cols }, 1)))
}

#[cfg(test)]
mod tests {
    use ::ndarray::{Array2, Axis, s};

    use super::*;

    fn text(array: ArrayView2<'_, f32>) -> String {
        Rows::try_from(array).err().unwrap().to_string()
    }

    #[test]
    fn arrays_that_are_not_rows_are_refused() {
        let array = Array2::<f32>::zeros((3, 4));
        let need = "view: `array` must have columns one element apart, got";
        assert_eq!(text(array.t()), format!("{need} 4"));
        assert_eq!(text(array.slice(s![.., ..;2])), format!("{need} 2"));
        let reversed = "view: `array` must have columns that are not reversed, one element apart, got 1";
        assert_eq!(text(array.slice(s![.., ..;-1])), reversed);
        assert_eq!(text(array.slice(s![..;-1, ..])), "view: `array` must have rows that are not reversed, got 4");
        let row = array.row(0);
        assert_eq!(text(row.broadcast((3, 4)).unwrap()), "view: `stride` must have at least `cols` elements, got 0");
    }

    #[test]
    fn strides_that_say_nothing_are_not_asked() {
        let array = Array2::from_shape_fn((3, 4), |(row, col)| (10 * row + col) as f32);
        let rows = |array| Rows::try_from(array).unwrap();
        let column = rows(array.slice(s![.., 2..3]));
        assert_eq!((column.dims(), column.stride(), column.host().row(2)), ([3, 1], 4, &[22.0][..]));
        let last = rows(array.slice(s![..;-3, ..]).slice_move(s![..1, ..]));
        assert_eq!(last.as_slice(), Some(&[20.0, 21.0, 22.0, 23.0][..]));
        for none in [array.slice(s![..0, ..]), array.slice(s![.., ..0])] {
            assert_eq!(rows(none).as_slice(), Some(&[][..]));
        }
        let transposed = array.t();
        assert_eq!(rows(transposed.slice(s![..1, ..1])).as_slice(), Some(&[0.0][..]));
        assert!(Rows::try_from(transposed.slice(s![..1, ..])).is_err(), "one row of elements four apart");
    }

    #[test]
    fn parts_side_by_side_are_written_at_once() {
        let mut array = Array2::<f32>::zeros((2, 5));
        let (left, right) = array.view_mut().split_at(Axis(1), 2);
        let (mut left, mut right) = (RowsMut::try_from(left).unwrap(), RowsMut::try_from(right).unwrap());
        left.host().row_mut(1).fill(1.0);
        right.host().row_mut(1).fill(2.0);
        left.host().row_mut(0)[1] = 3.0;
        assert_eq!(array, ::ndarray::arr2(&[[0.0, 3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 2.0, 2.0, 2.0]]));
    }

    #[test]
    fn rows_become_arrays() {
        let mut data: Vec<f32> = (0..11).map(|i| i as f32).collect();
        let rows = Rows::from_slice_strided(&data, 3, 3, 4).unwrap();
        let array = ArrayView2::try_from(rows).unwrap();
        assert_eq!(array, ::ndarray::arr2(&[[0.0, 1.0, 2.0], [4.0, 5.0, 6.0], [8.0, 9.0, 10.0]]));
        let single = ArrayView2::try_from(Rows::from_slice_strided(&data, 1, 3, 0).unwrap()).unwrap();
        assert_eq!(single, ::ndarray::arr2(&[[0.0, 1.0, 2.0]]));
        let rows = RowsMut::from_slice_strided(&mut data, 3, 3, 4).unwrap();
        ArrayViewMut2::try_from(rows).unwrap().fill(-1.0);
        assert_eq!(data, [-1.0, -1.0, -1.0, 3.0, -1.0, -1.0, -1.0, 7.0, -1.0, -1.0, -1.0]);
    }

    #[test]
    fn a_gpus_memory_is_no_array() {
        // SAFETY: nothing is read.
        let rows = unsafe { Rows::<f32>::from_raw(Place::Cuda(0), 256, 2, 2, 2).unwrap() };
        let text = ArrayView2::try_from(rows).err().unwrap().to_string();
        assert_eq!(text, "view: `rows` must be on the host, got rows on a GPU");
    }
}
