//! Encoded order is the order of the keys; everything comes back.

use super::*;
use proptest::prelude::*;
use std::cmp::Ordering;
use std::fmt::Debug;

fn encode<K>(key: &impl ToKey<K>) -> (Vec<u8>, Vec<u8>) {
    let (mut inside, mut last) = (Vec::new(), Vec::new());
    key.write_key(&mut inside);
    key.write_last_key(&mut last);
    (inside, last)
}

/// Bytes order as the keys do, both inside and at the end of a key; both come back; an encoding is no start of another.
fn check<K: Key + PartialEq + Debug>(a: &K, b: &K, order: Ordering) -> std::result::Result<(), TestCaseError> {
    let (inside_a, last_a) = encode::<K>(a);
    let (inside_b, last_b) = encode::<K>(b);
    prop_assert_eq!(inside_a.cmp(&inside_b), order);
    prop_assert_eq!(last_a.cmp(&last_b), order);
    prop_assert!(order == Ordering::Equal || inside_a.is_empty() || !inside_b.starts_with(&inside_a));
    prop_assert!(K::read_last_key(&last_a).as_ref() == Some(a));
    let followed = [&inside_a[..], b"\0rest"].concat();
    let mut rest = &followed[..];
    prop_assert!(K::read_key(&mut rest).as_ref() == Some(a));
    prop_assert_eq!(rest, b"\0rest");
    let mut rest = &followed[..];
    prop_assert_eq!(K::skip_key(&mut rest), Some(()));
    prop_assert_eq!(rest, b"\0rest");
    for cut in 0..inside_a.len() {
        prop_assert_eq!(K::read_key(&mut &inside_a[..cut]), None);
    }
    Ok(())
}

fn ordered<K: Key + Ord + Debug>(a: K, b: K) -> std::result::Result<(), TestCaseError> {
    check(&a, &b, a.cmp(&b))?;
    check(&a, &a, Ordering::Equal)?;
    check(&Some(&a).map(|_| 1u8), &None, Ordering::Greater)?;
    let order = b.cmp(&a);
    check(&Reverse(a), &Reverse(b), order)
}

fn value<V: Value + PartialEq + Debug>(value: V) -> std::result::Result<(), TestCaseError> {
    let (mut inside, mut last) = (Vec::new(), Vec::new());
    value.write_value(&mut inside);
    value.write_last_value(&mut last);
    prop_assert!(V::read_last_value(&last).as_ref() == Some(&value));
    inside.extend_from_slice(b"rest");
    let mut rest = &inside[..];
    prop_assert!(V::read_value(&mut rest).as_ref() == Some(&value));
    prop_assert_eq!(rest, b"rest");
    Ok(())
}

/// Short strings of few characters: many are equal, or one is the start of another.
fn text() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!['\0', '\u{1}', 'a', '\u{ff}', '😀']), 0..5)
        .prop_map(|all| all.into_iter().collect())
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(vec![0u8, 1, 0x7f, 0xfe, 0xff]), 0..5)
}

proptest! {
    #[test]
    fn numbers_order(a in any::<(u8, u16, u32, u64)>(), b in any::<(u8, u16, u32, u64)>()) {
        ordered(a.0, b.0)?;
        ordered(a.1, b.1)?;
        ordered(a.2, b.2)?;
        ordered(a.3, b.3)?;
        ordered(u128::from(a.3) << 60, u128::from(b.3) << 60)?;
    }

    #[test]
    fn signed_numbers_order(a in any::<(i8, i16, i32, i64)>(), b in any::<(i8, i16, i32, i64)>()) {
        ordered(a.0, b.0)?;
        ordered(a.1, b.1)?;
        ordered(a.2, b.2)?;
        ordered(a.3, b.3)?;
        ordered(i128::from(a.3) << 60, i128::from(b.3) << 60)?;
    }

    #[test]
    fn floats_order(a in any::<(f64, f32)>(), b in any::<(f64, f32)>()) {
        let special = [0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, f64::MIN_POSITIVE, a.0];
        for other in special {
            check(&b.0, &other, b.0.total_cmp(&other))?;
        }
        check(&a.1, &b.1, a.1.total_cmp(&b.1))?;
    }

    #[test]
    fn strings_order(a in text(), b in text(), c in bytes(), d in bytes()) {
        ordered(a.clone(), b.clone())?;
        ordered(c.clone(), d.clone())?;
        ordered((a.clone(), c.clone()), (b.clone(), d.clone()))?;
        ordered((c.clone(), a.clone(), true), (d.clone(), b.clone(), false))?;
        ordered((Some(a.clone()), 3u8), (None, 4))?;
        ordered(Some((a.clone(), b.clone())), Some((b.clone(), a.clone())))?;
        ordered((Reverse(a.clone()), Reverse(c.clone())), (Reverse(b.clone()), Reverse(d.clone())))?;
        prop_assert_eq!(encode::<(String, u8)>(&(a.as_str(), 1u8)), encode::<(String, u8)>(&(a, 1u8)));
    }

    #[test]
    fn values_come_back(a in any::<(u16, u32, u64, i16, i32, i64)>(), b in any::<(bool, u8, i8)>(), text in text(), c in bytes()) {
        value(a.0)?;
        value(a.1)?;
        value(a.2)?;
        value(a.3)?;
        value(a.4)?;
        value((a.5, f64::from(a.1)))?;
        value(b)?;
        value((text.clone(), c.clone(), Some(text.clone()), None::<u8>))?;
        value(Some(c.clone()))?;
        value((List(vec![(text, 1u8), (String::new(), 2)]), c))?;
    }

    #[test]
    fn garbage_is_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        let _ = <(String, Option<u32>, Reverse<Vec<u8>>)>::read_last_key(&bytes);
        let _ = <(List<(String, u64)>, Option<Vec<u8>>)>::read_last_value(&bytes);
        let _ = List::<()>::read_last_value(&bytes);
    }
}

#[test]
fn a_count_is_a_value() {
    let mut out = Vec::new();
    300u64.write_last_value(&mut out);
    assert_eq!(super::super::decode_count(&out).unwrap(), 300);
    assert_eq!(u16::read_last_value(&[0xff, 0xff, 0xff, 1]), None);
}
