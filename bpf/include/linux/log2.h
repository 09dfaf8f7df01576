/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once
#define ilog2(x) (63 - __builtin_clzll(x))
