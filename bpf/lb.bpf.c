/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The load balancer: a packet for a VIP goes to one of its reals in an outer IPv4 header, everything else
 * passes untouched. Read lb() at the end first: parse, match the VIP, pick the real, rewrite, count, verdict.
 *
 * This file alone touches maps (bcc rewrites map calls nowhere else). The agent, or the test, sets by -D what
 * it must agree on; maps are pinned in PIN_DIR, where the agent finds them.
 */
#define BPF_LICENSE Dual BSD/GPL

#if !defined(PIN_DIR) || !defined(LB_VIPS) || !defined(LB_REALS) || !defined(LB_FLOWS)
#error "PIN_DIR, LB_VIPS, LB_REALS and LB_FLOWS (entries of the maps) must be given by -D"
#endif
#if !defined(LB_INDEX_BITS)
#error "LB_INDEX_BITS (log2 of the entries of the index of VIPs) must be given by -D"
#endif
#if !defined(LB_SEED) || !defined(LB_ENCAP_SOURCE) || !defined(LB_ENCAP_SOURCE_BITS)
#error "LB_SEED (64 bits), LB_ENCAP_SOURCE (host order) and LB_ENCAP_SOURCE_BITS (prefix) must be given by -D"
#endif

#include "abi.h"
#include "cursor.h"
#include "encap.h"
#include "eth.h"
#include "hash.h"
#include "icmp.h"
#include "ip4.h"
#include "l4.h"

_Static_assert(sizeof(struct addr) == 16 && sizeof(struct vip_key) == 20 && sizeof(struct vip) == 16, "abi.h");
_Static_assert(sizeof(struct hop) == 20 && sizeof(struct real) == 64, "abi.h: a real is one cache line");
_Static_assert(sizeof(struct flow_key) == 40 && sizeof(struct flow) == 24, "abi.h");

/* address, port, protocol -> VIP. The agent writes. A miss: not ours. */
BPF_TABLE_PINNED("hash", struct vip_key, struct vip, vips, LB_VIPS * 4, PIN_DIR "/vips");

/* place -> the only VIP that can be there, see abi.h. The agent writes. Zero: ask vips. */
BPF_TABLE_PINNED("array", u32, struct index_entry, vip_index, 1 << LB_INDEX_BITS, PIN_DIR "/vip_index",
		 BPF_F_MMAPABLE);

/* Only says what a ring is: slot -> owner, elder, TRACKED. Rings differ in size, hence F_INNER_MAP. */
BPF_F_TABLE("array", u32, u64, ring_proto, 1 << RING_BITS_MIN, BPF_F_MMAPABLE | BPF_F_INNER_MAP);

/* place of a ring, see abi.h -> ring. The agent swaps. A miss: the agent announced a VIP too early. */
BPF_TABLE_PINNED("array_of_maps$ring_proto", u32, int, rings, LB_VIPS * RING_SIZES, PIN_DIR "/rings");

/* number -> backend. The agent writes. Number 0 is nobody. */
BPF_TABLE_PINNED("array", u32, struct real, reals, LB_REALS, PIN_DIR "/reals", BPF_F_MMAPABLE);

/* 5-tuple -> record. Packets write, the agent's sweep deletes. A miss: the ring decides. */
BPF_TABLE_PINNED("lru_hash", struct flow_key, struct flow, flows, LB_FLOWS, PIN_DIR "/flows");

/* number of VIP, number of real, reason -> what went through or did not. Packets write. */
BPF_TABLE_PINNED("percpu_array", u32, struct counter, vip_counters, LB_VIPS, PIN_DIR "/vip_counters");
BPF_TABLE_PINNED("percpu_array", u32, struct counter, real_counters, LB_REALS, PIN_DIR "/real_counters");
BPF_TABLE_PINNED("percpu_array", u32, u64, drops, DROP_REASONS, PIN_DIR "/drops");

#define SLOT_REAL_MASK ((1 << SLOT_REAL_BITS) - 1)

enum parsed {
	FOREIGN,	/* nothing that a VIP can be for */
	WHOLE,
	FRAGMENT,	/* of a datagram; only the first one has ports, so none can be sent on */
	TRUNCATED,	/* the frame ends before its L4 header does */
};

struct packet {
	__be32 src;
	__be32 dst;
	__u32 ports;
	__u16 length;		/* of the IP packet; the frame may be longer, as Ethernet pads short ones */
	bool fits;		/* length agrees with frame and headers */
	__u8 proto;
	__u8 tos;
	__u8 tcp_flags;		/* 0 for UDP */
};

static __always_inline enum parsed parse(struct xdp_md *ctx, struct packet *packet)
{
	struct cursor cursor = {(void *)(long)ctx->data, (void *)(long)ctx->data_end};
	struct eth *eth = take_eth(&cursor);
	struct ip4 *ip;
	struct tcp *tcp;
	struct udp *udp;
	__u32 headers;

	if (!eth || eth->type != ETH_IP4)
		return FOREIGN;
	ip = take_ip4(&cursor);
	if (!ip || (ip->proto != IP_TCP && ip->proto != IP_UDP))
		return FOREIGN;
	packet->src = ip->src;
	packet->dst = ip->dst;
	packet->proto = ip->proto;
	packet->tos = ip->tos;
	packet->length = bpf_ntohs(ip->length);
	if (ip->fragment & IP4_FRAGMENT)
		return FRAGMENT;

	headers = ip4_header_bytes(ip);
	cursor.at = (void *)ip + headers;
	if (packet->proto == IP_TCP) {
		tcp = take(&cursor, sizeof(*tcp));
		if (!tcp)
			return TRUNCATED;
		packet->ports = tcp->ports;
		packet->tcp_flags = tcp->flags;
		headers += sizeof(*tcp);
	} else {
		udp = take(&cursor, sizeof(*udp));
		if (!udp)
			return TRUNCATED;
		packet->ports = udp->ports;
		headers += sizeof(*udp);
	}
	packet->fits = packet->length >= headers && (void *)ip + packet->length <= cursor.end;
	return WHOLE;
}

static __always_inline int drop(__u32 reason)
{
	__u64 *count = drops.lookup(&reason);

	if (count)
		*count += 1;
	return XDP_DROP;
}

/* Keys are written as wide as the kernel reads them: a read that spans two writes must wait for both. */
static __always_inline void map_ip4(__u64 *address, __be32 ip4)
{
	address[0] = 0;
	address[1] = (__u64)ip4 << 32 | bpf_htonl(0xffff);
}

static __always_inline struct vip *find(__be32 address, __be16 port, __u8 proto)
{
	struct { __u64 address[2]; __u32 port_proto; } key;

	map_ip4(key.address, address);
	key.port_proto = port | proto << 16;
	return vips.lookup((struct vip_key *)&key);
}

/* For what has no ports to match by: count and drop it if its address is some VIP's. */
static __always_inline int drop_if_ours(const struct packet *packet, __u32 reason)
{
	return find(packet->dst, 0, 0) ? drop(reason) : XDP_PASS;
}

/* Is it for a VIP? Then *vip tells which; its claimant need not be there. */
static __always_inline bool match(const struct packet *packet, struct vip *vip)
{
	__u64 key = packet->dst | (__u64)dst_port(packet->ports) << 32 | (__u64)packet->proto << 48;
	__u32 place = key * INDEX_MULTIPLIER >> (64 - LB_INDEX_BITS);
	volatile struct index_entry *entry = vip_index.lookup(&place);
	const struct vip *entered;
	__u64 there;

	if (!entry)
		return false;
	there = entry->key;
	if (there == key) {
		vip->number = entry->number;
		vip->ring_bits = entry->ring_bits;
		vip->flags = entry->flags;
		if (entry->key == key)
			return true;	/* otherwise the agent is at it just now */
	} else if (there != INDEX_UNKNOWN) {
		return false;
	}

	entered = find(packet->dst, dst_port(packet->ports), packet->proto);
	if (!entered)
		return false;
	*vip = *entered;
	return true;
}

/* The slot's word, only its owner while it is not TRACKED; 0, nobody's, with *found unset, without a ring. */
static __always_inline __u64 read_slot(const struct vip *vip, __u64 hash, bool *found)
{
	__u32 place = vip->number * RING_SIZES + (__u32)(vip->ring_bits - RING_BITS_MIN) / RING_BITS_STEP;
	__u32 index = hash >> (64 - vip->ring_bits);
	__u32 pair = index >> 1;
	void *ring = rings.lookup(&place);
	volatile __u32 *heads;
	volatile __u64 *slot;
	__u32 head;

	if (!ring)
		return 0;
	heads = bpf_map_lookup_elem(ring, &pair);
	if (!heads)
		return 0;
	*found = true;
	head = heads[index & 1];
	if (!(head >> HEAD_TRACKED_SHIFT))
		return head;
	index += 1U << (vip->ring_bits - 1);
	slot = bpf_map_lookup_elem(ring, &index);
	return slot ? *slot : 0;	/* read once: the agent may be settling it */
}

static __always_inline bool is_serving(__u32 number)
{
	struct real *real = reals.lookup(&number);

	return number && real && real->state == REAL_SERVING;
}

/*
 * Which real, by the rules of two generations: new connections are the owner's; older ones the elder's,
 * unless a record says otherwise. Records are read and written in TRACKED slots only, and for UDP, which
 * does not say when a connection begins. 0: nobody.
 */
static __always_inline __u32 pick(const struct vip *vip, const struct packet *packet, __u64 slot, __u64 hash)
{
	__u32 owner = slot & SLOT_REAL_MASK, elder = slot >> SLOT_ELDER_SHIFT & SLOT_REAL_MASK, number;
	bool is_new = packet->proto == IP_UDP || opens(packet->tcp_flags), has_record = false;
	struct { __u64 src[2], dst[2]; __u32 ports, proto; } key;
	struct flow fresh;
	struct flow *record;
	struct real *real;
	__u64 now;

	if (packet->proto == IP_UDP ? vip->flags & VIP_UDP_STATELESS : !(slot >> SLOT_TRACKED_SHIFT))
		return owner;

	map_ip4(key.src, packet->src);
	map_ip4(key.dst, packet->dst);
	key.ports = packet->ports;
	key.proto = packet->proto;
	now = bpf_ktime_get_coarse_ns();
	record = flows.lookup((struct flow_key *)&key);
	if (record && record->vip == vip->number) {
		number = record->real;
		real = reals.lookup(&number);
		has_record = real && real->generation == record->generation;
		if (has_record && real->state == REAL_SERVING && !opens(packet->tcp_flags)) {
			if (record->seen_ns != now)
				record->seen_ns = now;
			if (ends(packet->tcp_flags))
				record->flags |= FLOW_ENDING;
			return number;
		}
	}

	/* A record of a dead real tells that the connection was lost: it is not the elder's. */
	number = !is_new && !has_record && is_serving(elder) ? elder : owner;
	real = reals.lookup(&number);
	if (!number || !real)
		return 0;
	fresh.seen_ns = now;
	fresh.real = number;
	fresh.hash = hash >> 32;
	fresh.vip = vip->number;
	fresh.generation = real->generation;
	fresh.flags = ends(packet->tcp_flags) ? FLOW_ENDING : 0;
	fresh.pad = 0;
	flows.update((struct flow_key *)&key, &fresh);
	return number;
}

static __always_inline void count(struct counter *counter, __u64 bytes)
{
	if (counter) {
		counter->packets += 1;
		counter->bytes += bytes;
	}
}

/* Tell the sender which size fits, from the VIP. What is too short to be quoted is only dropped. */
static __always_inline int answer_too_big(struct xdp_md *ctx, const struct packet *packet, __u16 mtu)
{
	int cut = (int)(ctx->data_end - ctx->data) - (int)(sizeof(struct eth) + ICMP_QUOTE);
	struct too_big_frame *frame;

	drop(DROP_TOO_BIG);
	if (packet->length < ICMP_QUOTE || cut < 0 || bpf_xdp_adjust_tail(ctx, -cut) ||
	    bpf_xdp_adjust_head(ctx, -(int)sizeof(struct too_big)))
		return XDP_DROP;
	frame = (void *)(long)ctx->data;
	if ((void *)(frame + 1) > (void *)(long)ctx->data_end)
		return XDP_DROP;
	turn_back(&frame->eth, (void *)frame + sizeof(struct too_big));
	write_icmp(&frame->head.icmp, mtu);
	frame->head.icmp.checksum = fold((__u32)bpf_csum_diff(0, 0, &frame->head.icmp, ICMP_BYTES, 0));
	write_ip4(&frame->head.ip, ICMP_TOS, sizeof(frame->head.ip) + ICMP_BYTES, 0, IP_ICMP, packet->dst,
		  packet->src);
	return XDP_TX;
}

static __always_inline bool encapsulate(struct xdp_md *ctx, const struct packet *packet,
					const struct real *real, const struct hop *hop, __u64 hash)
{
	const __u32 *address = (const void *)&real->address;
	struct encap *outer;

	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(struct ip4)))
		return false;
	outer = (void *)(long)ctx->data;
	if ((void *)(outer + 1) > (void *)(long)ctx->data_end)
		return false;
	write_eth(&outer->eth, hop);
	write_ip4(&outer->ip, packet->tos, packet->length + sizeof(struct ip4), IP4_DF, IP_IPIP,
		  encap_source(LB_ENCAP_SOURCE, LB_ENCAP_SOURCE_BITS, hash), address[3]);
	return true;
}

int lb(struct xdp_md *ctx)
{
	struct packet packet = {};
	struct vip vip;
	struct real *real;
	const struct hop *hop;
	__u64 hash, slot;
	__u32 number;
	bool found = false;

	switch (parse(ctx, &packet)) {
	case FOREIGN:
		return XDP_PASS;
	case FRAGMENT:
		return drop_if_ours(&packet, DROP_FRAGMENT);
	case TRUNCATED:
		return drop_if_ours(&packet, DROP_MALFORMED);
	case WHOLE:
		break;
	}

	if (!match(&packet, &vip))
		return XDP_PASS;
	if (!packet.fits)
		return drop(DROP_MALFORMED);

	hash = flow_hash(LB_SEED, packet.src, packet.dst, packet.ports, packet.proto);
	slot = read_slot(&vip, hash, &found);
	if (!found)
		return drop(DROP_NO_RING);
	number = pick(&vip, &packet, slot, hash);
	real = reals.lookup(&number);
	if (!number || !real)
		return drop(DROP_NO_BACKEND);
	hop = &real->hops[real->hop_now & 1];
	if (!hop->ifindex)
		return drop(DROP_NO_HOP);

	if (packet.length + sizeof(struct ip4) > hop->mtu)
		return answer_too_big(ctx, &packet, hop->mtu - sizeof(struct ip4));
	if (!encapsulate(ctx, &packet, real, hop, hash))
		return drop(DROP_NO_ROOM);

	count(vip_counters.lookup(&vip.number), packet.length);
	count(real_counters.lookup(&number), packet.length);
	return hop->ifindex == ctx->ingress_ifindex ? XDP_TX : bpf_redirect(hop->ifindex, 0);
}
