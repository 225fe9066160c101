"""What is counted in the machine code of a kernel."""

import re

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.M)


def blocks_in_loops(code):
    """The instructions of `code`, a list of (address, text), that can be reached from themselves."""
    starts = {address: i for i, (address, _) in enumerate(code)}
    successors = []
    for i, (_, text) in enumerate(code):
        words = re.sub(r"^@!?U?P\w+ +", "", text)
        target = re.search(r"\b0x([0-9a-f]+)\b", words) if re.match(r"BRA|CALL|BSSY", words) else None
        jumps = [starts[int(target[1], 16)]] if target and int(target[1], 16) in starts else []
        # A branch on condition, of a predicate in front or among its operands, may be passed by.
        ends = re.match(r"BRA|EXIT|RET", words) and words == text and not re.match(r"BRA(\.\S+)* +!?U?P|BRA\.U\.ANY|BRA\.DIV", words)
        successors.append(jumps + ([] if ends or i + 1 == len(code) else [i + 1]))
    return [code[i] for part in components(successors) for i in part if len(part) > 1 or i in successors[i]]


def components(successors):
    """The strongly connected components of a graph (Tarjan), without recursion."""
    order, low, stack, on_stack, found = {}, {}, [], set(), []
    for root in range(len(successors)):
        if root in order:
            continue
        work = [(root, iter(successors[root]))]
        order[root] = low[root] = len(order)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for after in rest:
                if after not in order:
                    order[after] = low[after] = len(order)
                    stack.append(after)
                    on_stack.add(after)
                    work.append((after, iter(successors[after])))
                    break
                if after in on_stack:
                    low[node] = min(low[node], order[after])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    at = stack.index(node)
                    found.append(stack[at:])
                    on_stack.difference_update(stack[at:])
                    del stack[at:]
    return found


def counts(text):
    """Of one entry's code: tensor-core products, waits for them, tensor copies by their rank; accesses to local memory; and what costs a
    loop dearly: barriers that wait for the whole GPU's memory, and flushes of the L1 cache."""
    code = [(int(address, 16), instruction) for address, instruction in INSTRUCTION.findall(text)]
    count = lambda pattern, among: sum(bool(re.search(pattern, instruction)) for _, instruction in among)
    looped = blocks_in_loops(code)
    copies = sorted(re.findall(r"\bUTMALDG\.(\dD(?:\.MULTICAST)?)", text))
    return {
        "hgmma": count(r"\b[HQ]GMMA\.", code),
        "depbar": count(r"WARPGROUP\.DEPBAR", code),
        "tma": ",".join(copies).lower() or 0,
        "local": count(r"\b(LDL|STL)\b", code),
        "membar_in_loops": count(r"\bMEMBAR\.\S*(GPU|SYS)", looped),
        "flush_in_loops": count(r"\bCCTL\.IVALL", looped),
    }
