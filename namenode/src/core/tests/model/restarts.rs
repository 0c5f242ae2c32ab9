//! Images, restarts and calls that are sent again.

use super::super::*;
use super::driver::{Call, Driver, Image, writer_of};
use crate::core::recovery::RECOVERY_HOLDER;

impl Driver {
    pub fn slice(&mut self, pages: usize) {
        let Some(((txid, mut blobs), digest)) = self.slicing.take() else { return };
        if !self.world.core.checkpoint_slice(pages, &mut blobs) {
            self.slicing = Some(((txid, blobs), digest));
            return;
        }
        let mut core = Core::new_for_load(self.world.core.settings().clone());
        blobs.iter().rev().for_each(|page| core.load_page(page).unwrap());
        core.finish_load(txid).unwrap();
        assert_eq!(core.digest(), digest, "the image is not the state at its transaction");
        // An image never knows more than the log.
        if self.world.synced < txid {
            self.world.sync();
        }
        self.images.push((txid, blobs));
    }

    fn replay_from(&self, image: Option<&Image>) -> Core {
        let mut core = Core::new_for_load(self.world.core.settings().clone());
        if let Some((txid, blobs)) = image {
            blobs.iter().for_each(|page| core.load_page(page).unwrap());
            core.finish_load(*txid).unwrap();
        }
        let from = core.last_txid();
        for (txid, edit) in self.world.log.iter().filter(|(txid, _)| *txid > from) {
            core.replay(*txid, edit.clone()).unwrap();
        }
        core.free_doomed(&mut usize::MAX.clone());
        core
    }

    pub fn restart(&mut self, lose: usize, image: bool) {
        let synced = self.world.synced;
        let kept = self.history.iter().filter(|past| past.txid >= synced).count();
        let lost = lose.min(kept.saturating_sub(1));
        self.history.truncate(self.history.len() - lost);
        let past = self.history.pop().unwrap();
        self.history.clear();
        self.world.log.truncate(past.txid.0 as usize);
        self.images.retain(|(txid, _)| *txid <= past.txid);
        self.slicing = None;
        let by_log = self.replay_from(None);
        if lost == 0 && past.txid == self.world.core.last_txid() {
            self.world.core.free_doomed(&mut usize::MAX.clone());
            assert_eq!(by_log.digest(), self.world.core.digest(), "replay gives another state");
            assert_eq!(by_log.leases.all().collect::<Vec<_>>(), self.world.core.leases.all().collect::<Vec<_>>());
        }
        let mut core = by_log;
        if let Some(found) = self.images.last() {
            let by_image = self.replay_from(Some(found));
            assert_eq!(by_image.digest(), core.digest(), "image and replay give another state");
            assert_eq!(by_image.leases.all().collect::<Vec<_>>(), core.leases.all().collect::<Vec<_>>());
            assert_eq!(by_image.last_txid(), core.last_txid());
            core = if image { by_image } else { core };
        }
        self.world.restart_with(core);
        self.world.synced = self.world.core.last_txid();
        (self.model, self.handles) = (past.model, past.handles);
        self.calls.truncate(past.calls);
        self.starts += 1;
        self.taken.clear();
        (0..3).for_each(|writer| self.renew(&writer_of(writer)));
        self.renew(RECOVERY_HOLDER);
    }

    /// A call is sent again: it gets its first answer and changes nothing, whatever happened since.
    pub fn again(&mut self, call: usize) {
        let recent: Vec<Call> = self.calls.iter().rev().take_while(|call| self.is_remembered(call)).cloned().collect();
        let Some(at) = call.checked_rem(recent.len()) else { return };
        let Call { user, request, answer, starts } = recent[at].clone();
        if matches!(request, ClientRequest::AddBlock(_)) && starts != self.starts {
            return; // its pipeline is not in the log; the call knows its block by the index
        }
        let edits = self.world.log.len();
        let token = self.world.send(user, request.clone());
        let result = self.world.answer(token).expect("a repeated call waits");
        assert_eq!(result, Ok(answer), "{request:?}");
        assert_eq!(self.world.log.len(), edits, "a repeated call changed something");
    }

    fn is_remembered(&self, call: &Call) -> bool {
        retry::call_of(&call.request).is_some_and(|context| context.call_id + 8 > self.next_call)
    }
}
