//! One MoE layer on random data: prints where the router sent each token.

use dropless::{Device, Error, ExpertWeights, RoutingBuffers, Rows, RowsMut, Workspace, moe};

fn main() -> Result<(), Error> {
    let stream = Device::cpu().stream()?;
    let (tokens, e, d, f) = (6, 8, 64, 96);
    let shape = moe::Shape::new(d, f, e, 2);
    let plan = moe::Plan::<f32>::new(shape, tokens)?;
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes())?;
    let mut buffers = RoutingBuffers::new(&stream, tokens, shape.top_k, e)?;

    let noise = |rows: usize, seed: f32| (0..rows * d).map(|i| 0.3 * (seed * (i + 1) as f32).sin()).collect::<Vec<f32>>();
    let (x, router, w1, v1, w2) = (noise(tokens, 12.9), noise(e, 78.2), noise(e * f, 43.7), noise(e * f, 91.3), noise(e * f, 37.7));
    let stack = |w| Rows::from_slice(w, e * f, d);
    let (w1, v1, w2) = (ExpertWeights::nk(stack(&w1)?, e)?, ExpertWeights::nk(stack(&v1)?, e)?, ExpertWeights::kn(stack(&w2)?, e)?);
    let weights = moe::Weights::new(Rows::from_slice(&router, e, d)?, moe::Experts::gated(w1, v1, w2));

    let mut y = vec![0f32; tokens * d];
    let (input, output) = (Rows::from_slice(&x, tokens, d)?, &mut RowsMut::from_slice(&mut y, tokens, d)?);
    let routing = moe::forward(&stream, &plan, input, &weights, &mut buffers, &mut workspace, output)?;

    for token in 0..tokens {
        let ids = routing.expert_ids().row_range(token..token + 1)?;
        println!("token {token}: experts {:?}, y = {:.3?} ...", ids.as_slice().unwrap_or_default(), &y[token * d..token * d + 4]);
    }
    Ok(())
}
