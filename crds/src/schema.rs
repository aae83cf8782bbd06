//! Schemas of the values that are one word on screen and one word in YAML: a workload, a peer, ports, a time. The API
//! server checks with them what it can; the readers of `policy` check the rest, and everything again.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

macro_rules! word {
    ($(#[$doc:meta])* $name:ident, $schema:tt) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name;

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}

word! {
    /// `policy::Workload`: NAME or NAMESPACE/NAME.
    Workload, {
        "type": "string",
        "minLength": 1,
        "maxLength": 317,
        "pattern": r"^[^\s/:()]+(/[^\s/:()]+)?$",
    }
}

word! {
    /// `policy::Peer`: a workload, `host:` or `outside:NETWORK`. The rule is what keeps a peer from being empty, and a
    /// network from carrying bits behind its prefix (which is always a mistake, of one kind or the other).
    Peer, {
        "type": "string",
        "minLength": 1,
        "maxLength": 317,
        "pattern": r"^(host:|outside:[0-9A-Fa-f.:]+(/[0-9]{1,3})?|[^\s/:()]+(/[^\s/:()]+)?)$",
        "x-kubernetes-validations": [
            {
                "rule": "!isCIDR(self)",
                "message": "a network is written outside:NETWORK, for example outside:192.0.2.0/24",
            },
            {
                "rule": "!self.startsWith('outside:') || !self.contains('/') \
                         || (isCIDR(self.substring(8)) && cidr(self.substring(8)) == cidr(self.substring(8)).masked())",
                "message": "outside: takes a network without bits behind its prefix, for example outside:192.0.2.0/24",
            },
            {
                "rule": "!self.startsWith('outside:') || self.contains('/') || isIP(self.substring(8))",
                "message": "outside: takes an address or a network, for example outside:192.0.2.7",
            },
        ],
    }
}

/// 1 to 65535.
macro_rules! port {
    () => {
        "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
    };
}

/// 0 to 255.
macro_rules! byte {
    () => {
        "([0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
    };
}

word! {
    /// `policy::Ports`: PROTOCOL/PORT or PROTOCOL/FIRST-LAST. The pattern holds the numbers within their ranges; that a range is
    /// not reversed is beyond a pattern.
    Ports, {
        "type": "string",
        "minLength": 3,
        "maxLength": 16,
        "pattern": concat!("^((tcp|udp|sctp)/", port!(), "(-", port!(), ")?|(icmp|icmpv6)/", byte!(), "(-", byte!(), ")?|ip", byte!(), ")$"),
        "x-kubernetes-validations": [
            {
                "rule": "!self.contains('-') || int(self.split('/')[1].split('-')[0]) <= int(self.split('/')[1].split('-')[1])",
                "message": "the range is reversed: write PROTOCOL/FIRST-LAST",
            },
            {
                "rule": "!(self in ['ip1', 'ip6', 'ip17', 'ip58', 'ip132'])",
                "message": "icmp, tcp, udp, icmpv6 and sctp go by their names, with a port or a type",
            },
        ],
    }
}

word! {
    /// Short and stable names that a machine made: ids of rules, codes of findings.
    Code, {
        "type": "string",
        "minLength": 1,
        "maxLength": 512,
    }
}

word! {
    /// A moment, RFC 3339.
    Time, {
        "type": "string",
        "format": "date-time",
    }
}

word! {
    /// `policy::guardrail::Party`: a peer, `project:NAME` or `workloads:`.
    Party, {
        "type": "string",
        "minLength": 1,
        "maxLength": 317,
        "pattern": r"^(host:|workloads:|project:[^\s/:()]+|outside:[0-9A-Fa-f.:]+(/[0-9]{1,3})?|[^\s/:()]+(/[^\s/:()]+)?)$",
        "x-kubernetes-validations": [
            {
                "rule": "!self.startsWith('outside:') || (self.contains('/') ? isCIDR(self.substring(8)) : isIP(self.substring(8)))",
                "message": "outside: takes an address or a network, for example outside:0.0.0.0/0",
            },
        ],
    }
}
