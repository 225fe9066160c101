//! Launches an image as Triton's own launcher would: `manifest.txt` says what that is.

use crate::cases::{Arg, Case};
use crate::runner::{self, Failure};
use ptx_emulator::{ElementType, Gpu, Interleave, L2Promotion, Launch, OobFill, Options, Swizzle};
use ptx_emulator::{TensorMap, TensorMapDesc};
use std::fs;
use std::path::PathBuf;

/// The folder of images.
pub fn folder() -> PathBuf {
    runner::kernels().join("triton")
}

pub fn ptx(image: &str) -> String {
    let path = folder().join("ptx").join(format!("{image}.ptx"));
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// One image of the manifest.
#[derive(Debug)]
pub struct Image {
    pub name: String,
    entry: String,
    warps: u32,
    ctas: u32,
    shared: u32,
    params: Vec<(String, Kind)>,
}

/// What an argument of the Triton kernel became.
#[derive(Debug)]
enum Kind {
    Pointer,
    /// A scalar of 4 bytes.
    Scalar,
    /// A tensor map; the sizes and the strides of its tensor follow as parameters.
    Map(Layout),
}

/// What the compiler decided of a tensor map: the driver's codes, and the box, outermost first.
#[derive(Debug)]
struct Layout {
    element: u32,
    swizzle: u32,
    tile: Vec<u32>,
}

/// Sizes and strides of a tensor in elements, outermost first.
struct View {
    dims: Vec<u64>,
    strides: Vec<u64>,
}

/// Reads the manifest; `generate.py` describes its lines.
pub fn manifest() -> Vec<Image> {
    let path = folder().join("manifest.txt");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut images = Vec::<Image>::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let number = |word: &str| match word.parse() {
            Ok(number) => number,
            Err(e) => panic!("manifest.txt: `{word}` in `{line}`: {e}"),
        };
        let words: Vec<&str> = line.split(' ').collect();
        let kind = match words[..] {
            ["kernel", name, "entry", entry, "warps", warps, "ctas", ctas, "shared", shared] => {
                images.push(Image {
                    name: name.into(),
                    entry: entry.into(),
                    warps: number(warps),
                    ctas: number(ctas),
                    shared: number(shared),
                    params: vec![],
                });
                continue;
            }
            ["param", _, "pointer"] => Kind::Pointer,
            ["param", _, "i32" | "f32"] => Kind::Scalar,
            ["param", _, "map", "type", element, "swizzle", swizzle, "box", ref tile @ ..] => {
                let tile = tile.iter().map(|word| number(word)).collect();
                Kind::Map(Layout { element: number(element), swizzle: number(swizzle), tile })
            }
            _ => panic!("manifest.txt: `{line}` is not understood"),
        };
        let image = images.last_mut().expect("a kernel stands before its parameters");
        image.params.push((words[1].into(), kind));
    }
    images
}

/// A launch of one image and what it must leave behind.
pub struct Work {
    /// One argument per argument of the Triton kernel; block, cluster and shared memory come from the
    /// manifest.
    pub case: Case,
    /// By argument: the view of one that is a tensor.
    views: Vec<Option<View>>,
}

impl Work {
    /// An image and Triton's grid of programs.
    pub fn of(image: &'static str, grid: [u32; 3]) -> Work {
        // Entry and threads are the manifest's; the 1 is never launched.
        Work { case: Case { grid, ..Case::new(image, image, image, 1, vec![]) }, views: vec![] }
    }

    pub fn arg(mut self, arg: Arg) -> Work {
        self.case.args.push(arg);
        self.views.push(None);
        self
    }

    pub fn input(self, bytes: Vec<u8>) -> Work {
        self.arg(Arg::input(bytes))
    }

    pub fn output(self, want: Vec<u8>) -> Work {
        self.arg(Arg::output(want))
    }

    pub fn i32(self, value: i32) -> Work {
        self.arg(Arg::U32(value as u32))
    }

    pub fn f32(self, value: f32) -> Work {
        self.arg(Arg::U32(value.to_bits()))
    }

    /// A tensor whose rows lie one behind the other.
    pub fn tensor(self, buffer: Arg, dims: &[u64]) -> Work {
        let strides = (0..dims.len()).map(|i| dims[i + 1..].iter().product()).collect();
        self.tensor_with(buffer, dims, strides)
    }

    pub fn tensor_with(mut self, buffer: Arg, dims: &[u64], strides: Vec<u64>) -> Work {
        self.case.args.push(buffer);
        self.views.push(Some(View { dims: dims.to_vec(), strides }));
        self
    }

    /// Launches this text of the image and returns the contents of each buffer afterwards, by argument.
    pub fn launch(&self, image: &Image, ptx: &str, options: Options) -> Result<Vec<Vec<u8>>, Failure> {
        let setup = |error: &dyn std::fmt::Display| Failure::Setup(format!("{}: {error}", image.name));
        let args = &self.case.args;
        if args.len() != image.params.len() {
            return Err(setup(&format!("{} arguments for {} parameters", args.len(), image.params.len())));
        }
        let mut gpu = Gpu::new(options);
        let module = gpu.load(&format!("{}.ptx", image.name), ptx).map_err(|e| setup(&e))?;
        let mut kernel = module.kernel(&image.entry).map_err(|e| setup(&e))?;
        kernel.set_max_dynamic_shared(image.shared).map_err(|e| setup(&e))?;

        let mut addresses = vec![0; args.len()];
        let mut pieces = Vec::<Vec<u8>>::new();
        for (i, (arg, (name, kind))) in args.iter().zip(&image.params).enumerate() {
            if let Arg::Buffer { before, .. } = arg {
                addresses[i] = gpu.alloc(before.len() as u64).map_err(|e| setup(&e))?;
                gpu.write(addresses[i], before).map_err(|e| setup(&e))?;
            }
            match (kind, arg, &self.views[i]) {
                (Kind::Pointer, Arg::Buffer { .. }, None) => pieces.push(addresses[i].to_le_bytes().into()),
                (Kind::Scalar, Arg::U32(value), None) => pieces.push(value.to_le_bytes().into()),
                (Kind::Map(layout), Arg::Buffer { .. }, Some(view)) => {
                    let map = encode(&gpu, addresses[i], layout, view).map_err(|e| setup(&e))?;
                    pieces.push(map.0.into());
                    pieces.extend(view.dims.iter().map(|&dim| (dim as u32).to_le_bytes().into()));
                    pieces.extend(view.strides.iter().map(|stride| stride.to_le_bytes().into()));
                }
                _ => return Err(setup(&format!("argument {i} does not suit parameter `{name}`: {kind:?}"))),
            }
        }
        // Two pointers to scratch memory that no kernel of the manifest uses.
        pieces.extend([vec![0; 8], vec![0; 8]]);

        let places = kernel.params();
        let sizes: Vec<usize> = pieces.iter().map(Vec::len).collect();
        if sizes != places.iter().map(|place| place.1).collect::<Vec<_>>() {
            return Err(setup(&format!("parameters of {sizes:?} bytes for {places:?}")));
        }
        let mut params = vec![0; kernel.param_bytes()];
        for (piece, (at, bytes, _)) in pieces.iter().zip(places) {
            params[at..at + bytes].copy_from_slice(piece);
        }
        let [x, y, z] = self.case.grid;
        let launch = Launch {
            grid: [x * image.ctas, y, z],
            block: [32 * image.warps, 1, 1],
            cluster: (image.ctas > 1).then_some([image.ctas, 1, 1]),
            shared_bytes: image.shared,
            params: &params,
        };
        gpu.launch(&kernel, &launch).map_err(Failure::Report)?;

        let mut outputs = vec![Vec::new(); args.len()];
        for (i, arg) in args.iter().enumerate() {
            if let Arg::Buffer { before, .. } = arg {
                outputs[i] = vec![0; before.len()];
                gpu.read(addresses[i], &mut outputs[i]).map_err(|e| setup(&e))?;
            }
        }
        Ok(outputs)
    }
}

/// A map over the tensor at `address`, as Triton's launcher encodes it: everything turned round to innermost
/// first.
fn encode(gpu: &Gpu, address: u64, layout: &Layout, view: &View) -> Result<TensorMap, String> {
    let element = ElementType::from_driver(layout.element).ok_or("no such element type")?;
    let strides = view.strides.iter().rev().skip(1).map(|stride| stride * element.bytes());
    let desc = TensorMapDesc {
        element,
        address,
        dims: &view.dims.iter().rev().copied().collect::<Vec<_>>(),
        strides: &strides.collect::<Vec<_>>(),
        box_dims: &layout.tile.iter().rev().copied().collect::<Vec<_>>(),
        element_strides: &[],
        interleave: Interleave::None,
        swizzle: Swizzle::from_driver(layout.swizzle).ok_or("no such swizzle")?,
        l2_promotion: L2Promotion::None,
        oob_fill: OobFill::Zeros,
    };
    gpu.encode_tensor_map(&desc).map_err(|e| e.to_string())
}
