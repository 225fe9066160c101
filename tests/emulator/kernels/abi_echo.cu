// abi_echo: writes every field of its parameter struct to its own eight-byte slot.
//
// Bug 33  two fields of equal size stand in another order than on the host's side; nothing but the echoed values can tell.
struct AbiEchoParams {
    unsigned long long map[16];  // stands for a tensor map: 128 bytes at the front
    unsigned long long* out;     // [24]
    unsigned rows;
#ifdef BUG_33
    unsigned stride;
    unsigned columns;
#else
    unsigned columns;
    unsigned stride;
#endif
    float scale;
    long long offset;
    unsigned short tag;
    unsigned char flag;
};

extern "C" __global__ void abi_echo(const __grid_constant__ AbiEchoParams p) {
    for (unsigned i = 0; i < 16; ++i) p.out[i] = p.map[i];
    p.out[16] = p.rows;
    p.out[17] = p.columns;
    p.out[18] = p.stride;
    p.out[19] = __float_as_uint(p.scale);
    p.out[20] = static_cast<unsigned long long>(p.offset);
    p.out[21] = p.tag;
    p.out[22] = p.flag;
    p.out[23] = sizeof(AbiEchoParams);
}
