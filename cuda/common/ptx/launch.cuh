// The order of launches: one function per rule, no logic.
#pragma once

// First in every kernel, before it touches global memory. Where the host allows it (programmatic dependent launch), the next kernel may now be
// started, and this one may have been started before the kernel in front of it was done, for whose end and writes it waits. Elsewhere
// neither does anything.
__device__ __forceinline__ void await_previous_launch() {
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
}
