// math: the library's functions as the compiler expands them: tables, slow paths, 64-bit division, local memory.
//
// Work    one thread per argument; row i of each output holds the functions of x[i] in the order of the source.
struct MathParams {
    const float* x;             // [n]
    const float* z;             // [n]
    const unsigned long long* u;  // [n]
    float* f;                   // [n, 24]
    double* d;                  // [n, 10]
    unsigned long long* i;      // [n, 16]
};

extern "C" __global__ void math(const __grid_constant__ MathParams p) {
    const unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
    const float x = p.x[t], z = p.z[t];
    float* f = p.f + 24 * t;
    *f++ = expf(x);
    *f++ = exp2f(x);
    *f++ = expm1f(x);
    *f++ = logf(fabsf(x));
    *f++ = log2f(fabsf(x));
    *f++ = log1pf(fabsf(x));
    *f++ = sinf(x);
    *f++ = cosf(x);
    *f++ = sinf(x * 1.0e6f);  // the slow path of the argument's reduction
    *f++ = tanhf(x);
    *f++ = sinhf(x);
    *f++ = atan2f(x, z);
    *f++ = acosf(x / (fabsf(x) + 1.0f));
    *f++ = erff(x);
    *f++ = powf(fabsf(x), z);
    *f++ = cbrtf(x);
    *f++ = rsqrtf(fabsf(x));
    *f++ = sqrtf(fabsf(x));
    *f++ = fmodf(x, z);
    *f++ = floorf(x) + ceilf(z) + truncf(x) + rintf(z) + roundf(x);
    *f++ = ldexpf(x, 5) + copysignf(z, x);
    *f++ = x / z;
    *f++ = fdimf(x, z) + fmaxf(x, z) - fminf(x, z);
    *f++ = __frcp_rn(z) + __fmul_rz(x, z) + __fadd_ru(x, z);

    const double a = x, b = z;
    double* d = p.d + 10 * t;
    *d++ = exp(a);
    *d++ = log(fabs(a));
    *d++ = sin(a);
    *d++ = pow(fabs(a), b);
    *d++ = a / b;
    *d++ = sqrt(fabs(a));
    *d++ = rsqrt(fabs(a));
    *d++ = fmod(a, b);
    *d++ = erf(a);
    *d++ = floor(a) + rint(b);

    const unsigned long long u = p.u[t], v = p.u[t ^ 1] | 1;
    const long long s = u, r = v;
    const unsigned w = u, q = w >> 7 | 1;
    unsigned long long* i = p.i + 16 * t;
    *i++ = u / v;
    *i++ = u % v;
    *i++ = s / (r >> 20 | 1);
    *i++ = s % (r >> 20 | 1);
    *i++ = w / q + w % q;
    *i++ = u / 10 + u % 1000;
    *i++ = static_cast<int>(w) / 7 + static_cast<int>(w) % 24;
    *i++ = __umulhi(w, q) + __umul64hi(u, v);
    *i++ = __clzll(s) * 64 + __popcll(u) + __ffsll(s) * 4096;
    *i++ = __brev(w) + __brevll(u);
    *i++ = __byte_perm(w, q, 0x5146) ^ __funnelshift_l(w, q, w & 31);
    *i++ = u << (w & 63) | u >> (w & 31);
    *i++ = static_cast<unsigned>(__dp4a(static_cast<int>(w), static_cast<int>(q), 5));
    *i++ = __float2ll_rz(x * 1.0e9f);
    *i++ = static_cast<long long>(a * 1.0e15);
    *i++ = static_cast<unsigned>(__float2int_rn(x) + __float_as_int(z));
}
