//! The suite `enforce`: real packets between namespaces that play containers, a real kernel between them. Needs root.

#![allow(clippy::unwrap_used, reason = "everything here is a test")]

/// A host with a bridge and members of these names; and another bridge, with members of its own.
macro_rules! node {
    ($host:ident, $bridge:ident: $($name:ident),*; $other:ident: $($there:ident),*) => {
        node!($host, $bridge: $($name),*);
        let mut $other = lab::Bridge::new(&$host, "br9", "10.9.0.0/24", "2001:db8:9::/64");
        $(let $there = $other.add(stringify!($there));)*
    };
    ($host:ident, $bridge:ident: $($name:ident),*) => {
        let $host = lab::Netns::new("host");
        let mut $bridge = lab::Bridge::new(&$host, "br0", "10.1.0.0/24", "2001:db8:1::/64");
        $(let $name = $bridge.add(stringify!($name));)*
    };
}

mod anew;
mod around;
mod believed;
mod change;
mod counts;
mod doors;
mod errors;
mod forged;
mod guard;
mod hostile;
mod injected;
mod kernel;
mod law;
mod layer2;
mod lost_state;
mod modes;
mod mutation;
mod offload;
mod owner;
mod pairs;
mod revoke;
mod stage;
mod third;
mod twins;
mod unsettled;
