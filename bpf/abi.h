/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the XDP program and the agent agree on: the structs that are keys and values of maps, and
 * their numbers. C includes this file, Python reads it through cffi: nothing is declared twice.
 * Only plain declarations, enums and integer #defines; users bring the __u8 .. __be16 types.
 *
 * A struct may only grow at its end, and zero must be the right value of what is new: then a newer
 * program can take over the maps of an older one.
 */
#pragma once

/* IPv4 is kept as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2). */
struct addr {
	__u8 bytes[16];
};

struct vip_key {
	struct addr address;
	__be16 port;
	__u8 proto;		/* IPPROTO_TCP or IPPROTO_UDP */
	__u8 pad;
};

/*
 * Each address of a VIP has one more entry, {address, port 0, proto 0}, whose number is this. It is
 * asked only for what has no ports to be told by: fragments, truncated packets.
 */
#define VIP_ANY_NUMBER 0xFFFFFFFF

#define VIP_UDP_STATELESS 1	/* flags: no records for UDP; the ring alone decides */

struct vip {
	__u32 number;		/* names the VIP's rings and its counters */
	__u8 ring_bits;		/* its ring has 2^ring_bits slots */
	__u8 flags;
	__u16 pad;
	__u64 claimant;		/* tells the agent which service has it; packets never read it */
};

/*
 * The index of VIPs, array of 2^bits places, saves packets the look-up in the hash of VIPs, which would be
 * half of their cost. A place tells which VIP entry (with a port) is the only one that belongs there, if any;
 * INDEX_UNKNOWN, with which a new program begins, says to ask the hash: that is never wrong.
 * key: address | port << 32 | proto << 48, as they lie in the packet and read little-endian;
 * its place: key * INDEX_MULTIPLIER (modulo 2^64) >> (64 - bits).
 * Who writes sets key to INDEX_UNKNOWN first, then the rest, then key; who reads looks at key twice.
 */
struct index_entry {
	__u64 key;
	__u32 number;		/* from here on as in struct vip */
	__u8 ring_bits;
	__u8 flags;
	__u16 pad;
};

#define INDEX_UNKNOWN 0
#define INDEX_NOBODY 1
#define INDEX_MULTIPLIER 0x9e3779b97f4a7c15

/*
 * Outer index of a VIP's ring: number * RING_SIZES + (ring_bits - RING_BITS_MIN) / RING_BITS_STEP.
 * Each size has a place of its own, so that a ring changes size by one update of the VIP.
 */
#define RING_BITS_MIN 12
#define RING_BITS_STEP 2
#define RING_SIZES 4		/* 2^12, 2^14, 2^16, 2^18 slots */

/*
 * A slot, 64 bits, host order:  TRACKED:1 | changed:23 | elder:20 | owner:20
 * owner and elder are numbers of reals; 0 is nobody. changed: second (CLOCK_MONOTONIC, modulo 2^23)
 * of the latest change of owner, meaningful while TRACKED.
 */
#define SLOT_REAL_BITS 20
#define SLOT_ELDER_SHIFT 20
#define SLOT_CHANGED_SHIFT 40
#define SLOT_CHANGED_BITS 23
#define SLOT_TRACKED_SHIFT 63

/*
 * The array of a ring with N slots has N/2 + N entries: first the heads of all slots, two to an entry, then
 * the slots. A head, 32 bits, is what nearly all packets need of a slot: TRACKED:1 | 0:11 | owner:20. So
 * those of a ring take half the cache that its slots would. Who settles a slot writes it, then its head.
 */
#define HEAD_TRACKED_SHIFT 31

struct hop {
	__u8 dmac[6];
	__u8 smac[6];
	__u32 ifindex;		/* 0: the way is not known, packets are dropped and counted */
	__u16 mtu;		/* of the path, for the outer packet, bytes */
	__u16 pad;
};

enum real_state {
	REAL_FREE = 0,		/* the number is free; its generation is kept */
	REAL_SERVING = 1,
	REAL_DEAD = 2,		/* records and elders that name it do not count */
};

/* One cache line. The hop in use is hops[hop_now]; the other may be written, then hop_now flips. */
struct real {
	struct addr address;
	__u32 vip;		/* number of the VIP this backend belongs to */
	__u16 generation;	/* grows with each new use of this number: old records do not match */
	__u8 state;		/* enum real_state */
	__u8 hop_now;
	struct hop hops[2];
};

struct flow_key {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 pad[3];
};

#define FLOW_ENDING 1		/* flags: FIN or RST was seen */

struct flow {
	__u64 seen_ns;		/* CLOCK_MONOTONIC (coarse) */
	__u32 real;
	__u32 hash;		/* top 32 bits of the flow's hash; slot = hash >> (32 - ring_bits) */
	__u32 vip;
	__u16 generation;
	__u8 flags;
	__u8 pad;
};

struct counter {
	__u64 packets;
	__u64 bytes;		/* of the IP packet as it came */
};

/* Why a packet for a VIP did not go on. Names are the metric's labels. */
enum drop {
	DROP_MALFORMED = 0,	/* lengths or header do not fit the frame */
	DROP_FRAGMENT = 1,
	DROP_NO_RING = 2,	/* the VIP has no ring: never while the agent is right */
	DROP_NO_BACKEND = 3,	/* nobody takes new connections */
	DROP_NO_HOP = 4,	/* the backend's next hop was never known */
	DROP_TOO_BIG = 5,	/* answered with ICMP "fragmentation needed" */
	DROP_NO_ROOM = 6,	/* the frame could not grow or shrink */
	DROP_REASONS = 7,
};
