/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The flow hash: 64 bits, seeded, so that nobody outside can aim at a slot. Top bits are the best ones,
 * and a slot is taken from them. Odd constants from SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
 * lbagent/core/flowhash.py computes the same.
 */
#pragma once

/* Addresses and ports as they lie in the packet, read little-endian; ports: source in the low half. */
static __always_inline __u64 flow_hash(__u64 seed, __u32 src, __u32 dst, __u32 ports, __u8 proto)
{
	__u64 x = seed ^ ((__u64)dst << 32 | src);

	x *= 0x9e3779b97f4a7c15ULL;
	x ^= x >> 32;
	x ^= (__u64)proto << 32 | ports;
	x *= 0xbf58476d1ce4e5b9ULL;
	x ^= x >> 32;
	x *= 0x94d049bb133111ebULL;
	return x;
}
