// Sizes that every tensor-core kernel lives with.
#pragma once

enum : int { WARPGROUP = 128 }; // threads
enum : int { PITCH = 128 };     // bytes of a row in shared memory: 64 elements, as wide as the swizzle
